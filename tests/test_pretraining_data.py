"""The pre-training recipe: what it reads, its settings and experiments, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaConfig

from fira_hf import FiraConfig
from fira_hf.arguments import parse_optim_args
from fira_hf.meta_models import build_on_meta
from fira_hf.targets import find_targets
from pretraining_tiny import sentences, stopped_after_8_steps, write_config, write_preset, write_text
from recipes import files
from recipes.pretraining import data, train
from recipes.pretraining.model import build, load_config
from recipes.pretraining.settings import METHODS, RECIPE, RecipeArguments
from recipes.settings import load_settings

EXPERIMENTS = sorted(path for path in RECIPE.experiments.glob("*/*.yaml") if path.stem != "base")


def arguments(**settings) -> RecipeArguments:
    return RecipeArguments(**({"method": "adamw", "model_config": "", "sequence_length": 16} | settings))


def rows(dataset) -> torch.Tensor:
    return torch.tensor(dataset["input_ids"])


def test_local_text_is_packed_into_blocks_without_a_gap(tmp_path):
    folder = write_text(tmp_path)
    tokenizer, train_data, valid_data = data.load(arguments(data_dir=str(folder)), 300, seed=0)
    for dataset, name in ((train_data, "train.txt"), (valid_data, "valid.txt")):
        tokens = rows(dataset)
        assert tokens.shape[1] == 16
        text = (folder / name).read_text()
        assert text.startswith(tokenizer.decode(tokens.flatten()).removesuffix(data.END))
        assert tokens.numel() > len(tokenizer(text)["input_ids"]) - 16
    assert rows(train_data).max() < 300


def test_records_end_with_the_token_for_the_end_of_a_text(tmp_path):
    for split in ("train", "valid"):
        lines = [json.dumps({"text": text, "source": "test"}) for text in sentences(1, 40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")
    tokenizer, train_data, _ = data.load(arguments(data_dir=str(tmp_path)), 300, seed=0)
    assert "".join(sentences(1, 40)).startswith(tokenizer.decode(rows(train_data).flatten()).replace(data.END, ""))
    assert (rows(train_data) == tokenizer.eos_token_id).sum() in (39, 40)
    assert tokenizer.decode(tokenizer.eos_token_id) == data.END


def test_the_embedded_text_has_no_paragraph_in_both_splits():
    paragraphs = {split: data.read("embedded", split)[0].split("\n\n") for split in ("train", "valid")}
    assert not set(paragraphs["train"]) & set(paragraphs["valid"])
    assert sum(map(len, paragraphs["train"])) > 200_000
    assert sum(map(len, paragraphs["valid"])) > 20_000


def test_evaluation_stops_at_its_number_of_tokens(tmp_path):
    folder = write_text(tmp_path)
    for tokens, count in ((1, 1), (16, 1), (17, 2)):
        settings = arguments(data_dir=str(folder), eval_tokens=tokens)
        assert len(data.load(settings, 300, seed=0)[2]) == count


def test_padding_is_neither_seen_nor_learned():
    batch = data.collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], length=4)
    assert batch["input_ids"][0].tolist()[:3] == [5, 6, 7]
    assert batch["input_ids"][1, 0] == 8
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [8, -100, -100, -100]]


@pytest.fixture
def c4(tmp_path, monkeypatch) -> dict:
    """C4 as a small stream of documents, and settings that train on it."""

    def load_dataset(path, name, split, streaming):
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        start = {"train": 1, "validation": 500}[split]

        def documents():
            for number, text in enumerate(sentences(start, 300)):
                yield {"text": text * (1 + number % 3), "url": "", "timestamp": ""}

        return datasets.IterableDataset.from_generator(documents)

    folder = write_text(tmp_path / "text")
    data.load(arguments(data_dir=str(folder)), 300, seed=0)[0].save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return {"data_dir": "c4", "tokenizer": str(tmp_path / "tokenizer"), "sequence_length": 20}


def test_c4_is_a_document_a_sequence_in_an_order_that_the_seed_chooses(c4):
    tokenizer, train_data, valid_data = data.load(arguments(**c4, eval_tokens=100), 300, seed=0)
    lengths = [len(row) for row in valid_data["input_ids"]]
    assert sum(lengths[:-1]) < 100 <= sum(lengths)
    assert max(lengths) == 20  # the longer ones are cut
    assert sentences(500, 1)[0].startswith(tokenizer.decode(valid_data[0]["input_ids"]))
    first = [row["input_ids"] for row in train_data]
    assert len(first) == 300
    assert first == [row["input_ids"] for row in train_data]
    other = [row["input_ids"] for row in data.load(arguments(**c4), 300, seed=1)[1]]
    assert first != other
    assert sorted(first) == sorted(other)


def test_a_run_on_a_stream_counts_tokens_without_padding_and_resumes_where_it_was(c4, tmp_path, monkeypatch):
    preset = write_preset(tmp_path / "tiny")
    stream = [f"--{key}={value}" for key, value in c4.items()]

    def run(name: str) -> dict:
        words = [str(preset / "fira.yaml"), "--output_dir", str(tmp_path / name), *stream, "--eval_tokens", "200"]
        assert train.main(words) == 0
        return files.read_json(tmp_path / name / "result.json")

    whole = run("whole")
    _, train_data, _ = data.load(arguments(**c4), 300, seed=42)
    seen = [len(row["input_ids"]) for _, row in zip(range(12 * 4), train_data, strict=False)]
    assert whole["training_tokens"] == sum(seen) < 12 * 4 * 20

    with stopped_after_8_steps(monkeypatch):
        run("stopped")
    resumed = run("stopped")
    for key in ("training_tokens", "train_loss", "eval_loss"):
        assert resumed[key] == whole[key]


def spoil(folder: Path, **texts: str) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"train_txt": "x"}, "where there is neither valid.txt nor valid.jsonl; name a folder"),
        ({"train_txt": "x", "train_jsonl": GOOD, "valid_txt": "x"}, "there are train.txt and train.jsonl; remove one"),
        ({"train_txt": " \n", "valid_txt": "x"}, "train.txt is empty"),
        ({"train_jsonl": GOOD + "{", "valid_txt": "x"}, "train.jsonl, line 2: not valid JSON"),
        ({"train_jsonl": GOOD + '{"txt": "a"}', "valid_txt": "x"}, 'train.jsonl, line 2: not a record with a "text"'),
        ({"train_txt": "word " * 99, "valid_txt": "x"}, "valid text has 2 tokens, less than one sequence; lower seq"),
    ],
)
def test_bad_data_is_an_error_before_anything_is_trained(tmp_path, capsys, monkeypatch, texts, message):
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("it must not begin"))
    preset = write_preset(tmp_path / "tiny")
    spoil(preset / "text", **texts)
    assert train.main([str(preset / "fira.yaml"), "--output_dir", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert message in files.read_json(tmp_path / "run" / "result.json")["error"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(tmp_path):
    folder = write_text(tmp_path)
    data.load(arguments(data_dir=str(folder)), 300, seed=0)[0].save_pretrained(tmp_path / "tokenizer")
    settings = arguments(data_dir=str(folder), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="yields the token 2[0-9]+, but the vocab_size of .* is 200"):
        data.load(settings, 200, seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "sgd"], "method is 'sgd'; it must be one of adamw, adamw-two-rates, fira"),
        (
            ["--model", "m"],
            "config.json; set one of them: model to continue from its weights, model_config to begin anew",
        ),
        (["--model_config", "null"], "model is None and model_config None; set one of them"),
        (
            ["--model_config", "null", "--model", "m", "--tokenizer", "t"],
            "tokenizer is t, but m has its own; leave it out",
        ),
        (["--other_data_dir", "d"], "other_data_dir is d, but a model from random weights has nothing to forget"),
        (
            ["--method", "lora-two-rates", "--dense_lr", "1", "--model_config", "null", "--model", "m"],
            "LoRA on a pretrained model leaves as they are; choose lora",
        ),
        (["--dense_lr", "1e-2"], "method is fira and dense_lr 0.01; adamw-two-rates and lora-two-rates need"),
        (["--method", "galore", "--optim", "fira"], "method galore cannot use optim fira"),
        (["--method", "relora"], "method relora needs relora_interval; set it to a number of optimizer steps"),
        (["--relora_warmup", "5"], "method fira has no restarts, but relora_warmup is set; leave it out"),
        (
            ["--method", "relora", "--relora_interval", "5", "--relora_warmup", "5"],
            "relora_warmup is 5; it must be less than relora_interval, 5",
        ),
        (["--lora_rank", "8"], "method fira has no LoRA, but lora_rank is set"),
        (["--data_dir", "c4"], "data_dir c4 is a stream, from which no tokenizer is learned"),
        (["--data_dir", "c4", "--tokenizer", "t5-base", "--max_steps", "-1"], "stream without an end; set max_steps"),
        (["--sequence_length", "0"], "sequence_length is 0; it must be at least 1"),
        (["--dtype", "float16"], "dtype is 'float16'; it must be one of float32, bfloat16"),
        (["--optim_target_modules", "q_proj"], "optim_target_modules cannot be set here: it is the linear layers"),
        (["--sequence_lenght", "8"], "There is no setting 'sequence_lenght'; near it: sequence_length"),
    ],
)
def test_bad_settings_are_errors_before_anything_is_loaded(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("it must not begin"))
    preset = write_preset(tmp_path / "tiny")
    assert train.main([str(preset / "fira.yaml"), "--output_dir", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_is_nowhere_is_named(tmp_path):
    settings = arguments(data_dir=str(write_text(tmp_path)), tokenizer="nobody/nothing")
    with pytest.raises(OSError, match="tokenizer is nobody/nothing: not a folder here"):
        data.load(settings, 300, seed=0)


def test_a_missing_model_config_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model_config nowhere.json; those of the paper are"):
        load_config("nowhere.json")
    assert load_config(str(write_config(tmp_path / "config.json"))).hidden_size == 32


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_experiment_is_valid_and_says_how_to_launch_it(path):
    settings = load_settings(RECIPE, path, {})
    assert settings["method"] == path.stem
    train.parse(settings | {"use_cpu": True, "output_dir": "out"})
    assert path.read_text().splitlines()[0] == (
        f"# python -m recipes.pretraining.train recipes/pretraining/experiments/{path.parent.name}/{path.name}"
    )


def test_every_size_has_every_method_and_the_ablation_every_variant():
    found: dict[str, set[str]] = {}
    for path in EXPERIMENTS:
        found.setdefault(path.parent.name, set()).add(path.stem)
    ranks = {method for method in METHODS if "-rank-" in method}
    assert found.pop("ranks") == ranks
    assert found.pop("ablation") == set(VARIANTS)
    assert found.pop("continued") == CONTINUED | {"adamw", "lora", "fira", "fira-hf", "galore"}
    assert set(found) == {"tiny", "small", *PUBLISHED}
    for methods in found.values():
        assert methods == set(METHODS) - ranks - set(VARIANTS) - CONTINUED | {"fira"}


CONTINUED = {"lora-equal-bytes", "subspace-muon", "muon"}


def test_lora_of_equal_bytes_has_those_of_fira():
    """For SmolLM2-135M, whose shapes these are."""
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = build_on_meta(LlamaConfig(**shapes, **heads), "float32")
    folder = RECIPE.experiments / "continued"
    optim_args = load_settings(RECIPE, folder / "fira-hf.yaml", {})["optim_args"]
    fira = find_targets(model, FiraConfig(**parse_optim_args(optim_args))).state_bytes
    lora = load_settings(RECIPE, folder / "lora-equal-bytes.yaml", {})
    sides = sum(sum(p.shape) for name, p in model.named_parameters() if "attn" in name or "mlp" in name)
    assert 2 * 4 * sides * lora["lora_rank"] == pytest.approx(fira, rel=0.005)
    assert lora["lora_alpha"] == lora["lora_rank"]  # at scale 1, as the other LoRA


# What the trained settings of a variant are, where they differ from Fira's.
VARIANTS = {
    "fira": {},
    "fira-matrix": {"scaling": "matrix"},
    "fira-without-scaling": {"scaling": "none"},
    "fira-without-limiter": {"gamma": None},
    "fira-clipping": {"gamma": None, "max_grad_norm": 1.0},
    "fira-shrink": {"limiter": "shrink", "gamma": 0.5},
    "fira-tensor-scaling": {"limiter": "scale", "gamma": 0.5},
    "fira-only-scaling": {"alpha": 0.0},
    "fira-rmsprop": {"correct_bias": False, "adam_beta1": 0.0, "adam_beta2": 0.9},
    "fira-lion": {"base_optimizer": "lion", "adam_beta2": 0.99, "dense_lr": 0.01, "learning_rate": 3e-3},
    "fira-adafactor": {"base_optimizer": "adafactor"},
    "fira-gamma-1.1": {"gamma": 1.1},
    "fira-gamma-1.001": {"gamma": 1.001},
    "fira-gamma-1": {"gamma": 1.0},
}


def changes(method: str, base: str, variant: Path, size: str, read=parse_optim_args) -> dict:
    """The trained settings in which a variant at some size differs from the method that it varies."""

    def trained(path: Path, overrides: dict) -> dict:
        settings = load_settings(RECIPE, path, overrides) | {"use_cpu": True, "output_dir": "out"}
        arguments, training = train.parse(settings)
        optim_args = read(training.optim_args)
        return training.to_dict() | {"optim_args": None, "model_config": arguments.model_config} | optim_args

    before = trained(RECIPE.experiments / size / f"{base}.yaml", {})
    after = trained(variant, {"size": size})
    return {key: value for key, value in after.items() if before.get(key, ...) != value}


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("size", ["60m", "tiny", "1b"])
def test_a_variant_differs_from_fira_in_what_it_is_named_after(size, method):
    path = RECIPE.experiments / "ablation" / f"{method}.yaml"
    assert changes(method, "fira", path, size) == VARIANTS[method]


@pytest.mark.parametrize("method", [method for method in METHODS if "-rank-" in method])
def test_the_ranks(method):
    path = RECIPE.experiments / "ranks" / f"{method}.yaml"
    name, _, rank = method.split("-")
    found = changes(method, name, path, "60m", lambda text: dict(entry.split("=") for entry in text.split(", ")))
    assert found == ({} if rank == "128" else {"rank": rank})


def test_a_size_that_an_experiment_has_not_is_refused():
    with pytest.raises(FileNotFoundError, match="no experiment .*2b"):
        load_settings(RECIPE, RECIPE.experiments / "ablation" / "fira-matrix.yaml", {"size": "2b"})
    with pytest.raises(ValueError, match="size is 'tiny': leave it out"):
        load_settings(RECIPE, RECIPE.experiments / "60m" / "fira.yaml", {"size": "tiny"})


# Parameters, then Fira's learning rate, alpha, rank and interval, then steps and warm-up, all as published.
PUBLISHED = {
    "60m": (58_073_600, 0.01, 0.25, 128, 200, 10_000, 1_000),
    "130m": (134_105_856, 0.01, 0.25, 256, 200, 20_000, 2_000),
    "350m": (367_969_280, 0.01, 0.25, 256, 200, 60_000, 6_000),
    "1b": (1_339_082_752, 0.01, 0.0625, 512, 200, 100_000, 10_000),
    "7b": (6_738_415_616, 0.005, 0.0625, 64, 500, 10_000, 1_000),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_settings(size):
    parameters, rate, alpha, rank, interval, steps, warmup = PUBLISHED[size]
    settings = load_settings(RECIPE, RECIPE.experiments / size / "fira.yaml", {})
    own, training = train.parse(settings | {"use_cpu": True, "output_dir": "out"})
    with torch.device("meta"):
        assert build(load_config(own.model_config), own).num_parameters() == parameters
    assert training.optim_args == f"preset=published, rank={rank}, update_proj_gap={interval}, alpha={alpha}"
    assert training.learning_rate == rate
    assert (training.max_steps, training.warmup_steps) == (steps, warmup)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 512
    assert own.sequence_length == 256
    assert (own.data_dir, own.tokenizer, own.eval_tokens, own.dtype) == ("c4", "t5-base", 10_000_000, "bfloat16")
    assert training.max_grad_norm == (1.0 if size == "7b" else 0)
    assert (training.lr_scheduler_type, training.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (training.weight_decay, training.adam_epsilon) == (0, 1e-6)
    assert training.optim_target_modules == ["attn", "mlp"]
    of_fira = load_settings(RECIPE, RECIPE.experiments / size / "fira-hf.yaml", {})
    assert of_fira["optim_args"] == f"rank={rank}, alpha={alpha}, gamma=1.01, adjust_lr=none"
    for method in ("galore", "apollo"):
        other = load_settings(RECIPE, RECIPE.experiments / size / f"{method}.yaml", {})
        assert other["optim_args"].startswith(f"rank={rank}, update_proj_gap={interval}, scale=")
