"""`fira-hf`: what it prints, and what it says of words that cannot be meant."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import CTRLConfig

from conftest import build_llama, run_quietly
from fira_hf import FiraCallback
from fira_hf.cli import main
from fira_hf.memory import METHODS
from recipes.commonsense import train
from recipes.commonsense.dry_run import predict_memory as predict_dry_run
from recipes.commonsense.dry_run import shapes
from recipes.settings import load_settings

ROOT = Path(__file__).parents[1]
LLAMA_7B = "recipes/commonsense/experiments/llama7b/config.json"
# A command, and what it prints beneath it.
SHOWN = re.compile(r"```bash\n(fira-hf .*?)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    build_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


def read_json(capsys, *words):
    assert main(["memory", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_method_by_default(folder, capsys):
    found = read_json(capsys, "--model", folder, "--rank", "4")
    assert list(found) == list(METHODS)
    for one in found.values():
        assert one["total"] == one["weights"] + one["gradients"] + one["optimizer_state"]
    assert main(["memory", "--model", f"{folder}/config.json", "--rank", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(METHODS) and len(set(map(len, lines))) == 1


def test_the_options_reach_the_prediction(folder, capsys):
    def total(key, *words):
        return read_json(capsys, "--model", folder, "--rank", "4", "--method", "fira,lora", *words)[key]

    assert total("fira", "--dtype", "float32")["weights"] == 2 * total("fira")["weights"]
    assert total("fira", "--state_dtype", "bfloat16")["optimizer_state"] < total("fira")["optimizer_state"]
    of_dtypes = [total("fira", "--state_dtype", dtype)["optimizer_state"] for dtype in ("bfloat16", "int8")]
    assert of_dtypes[1] < of_dtypes[0]
    assert total("fira", "--base_optimizer", "lion")["optimizer_state"] < total("fira")["optimizer_state"]
    assert total("fira", "--target_modules", "q_proj")["optimizer_state"] > total("fira")["optimizer_state"]
    assert total("lora", "--lora_rank", "8")["gradients"] == 2 * total("lora")["gradients"]
    moment = ["--residual", "moment", "--base_optimizer", "muon", "--state_dtype", "int4"]
    assert total("fira", "--preset", "subspace-muon") == total("fira", *moment)
    of_preset = [total("fira", "--preset", "muon-4bit", "--rank", rank)["optimizer_state"] for rank in ("4", "8")]
    assert of_preset[0] < of_preset[1]
    batch = ["--batch_size", "8", "--sequence_length", "32"]
    assert total("lora", *batch)["activations"] > total("lora", *batch, "--gradient_checkpointing")["activations"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "none/config.json"], "--model none/config.json"),
        (["--method", "fira,adam"], "method 'adam'"),
        (["--rank", "0"], "rank=0"),
        (["--lora_rank", "0"], "lora_rank=0"),
        (["--batch_size", "1"], "sequence_length=None"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0"),
        (["--target_modules", "q_pro"], "'q_proj'"),
        (["--state_dtype", "float16"], "state_dtype='float16'"),
        (["--base_optimizer", "adam"], "base_optimizer='adam'"),
        (["--preset", "subspace_muon"], "'subspace-muon'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_says_which_word_in_one_line(words, said, folder, capsys):
    assert main(["memory", "--model", folder, *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and said in output.err and output.err.count("\n") == 1


def test_with_accumulation_layerwise_holds_all_gradients(folder, capsys):
    def gradients(*words):
        found = read_json(capsys, "--model", folder, "--rank", "4", "--method", "fira,fira_layerwise", *words)
        return [one["gradients"] for one in found.values()]

    of_fira, of_layerwise = gradients("--gradient_accumulation_steps", "1")
    assert of_layerwise < of_fira
    assert gradients("--gradient_accumulation_steps", "2") == [of_fira, of_fira]


LORAS = [name for name, method in METHODS.items() if method.lora]


@pytest.mark.parametrize(
    ("words", "missing", "said"),
    [
        (["--target_modules", "lm_head"], ["fira-on-lora", "fira-on-qlora"], "output head"),
        (["--lora_rank", "1000"], LORAS, "lora_rank=1000"),
        (["--target_modules", "all-linear-and-conv"], LORAS, "target_modules='all-linear-and-conv'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_default_method_that_cannot_be_predicted_costs_no_other_row(words, missing, said, folder, capsys):
    words = ["--model", folder, "--rank", "4", *words]
    others = [name for name in METHODS if name not in missing]
    found = read_json(capsys, *words)
    assert {name: found.pop(name) for name in others} == read_json(capsys, *words, "--method", ",".join(others))
    assert found.keys() == set(missing) and all(said in one["error"] for one in found.values())
    assert main(["memory", *words, "--method", ",".join(others)]) == 0
    rows = capsys.readouterr().out
    assert main(["memory", *words]) == 0
    shown = capsys.readouterr().out
    assert shown == rows + "".join(f"{name} is left out: {one['error']}\n" for name, one in found.items())
    # what is asked for by name is an error
    assert main(["memory", *words, "--method", f"fira,{missing[0]}"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"error: {found[missing[0]]['error']}\n"


def test_what_no_method_can_do_is_an_error(tmp_path, capsys):
    """Of methods that share a model, too, the later ones fail as the first."""
    CTRLConfig(vocab_size=64, n_embd=32, dff=40, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert main(["memory", "--model", str(tmp_path), "--rank", "4", "--gradient_checkpointing"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "checkpointing" in output.err


def test_a_model_that_is_no_language_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for command in ("memory", "inspect"):
        assert main([command, "--model", str(tmp_path)]) == 2
        assert "'vit'" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["memory", "--model", str(tmp_path)]) == 2
    assert "model_type" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"num_attention_heads": 0}, {"hidden_size": "big"}, {"hidden_act": "none such"}, {"pad_token_id": 10**6}],
    ids=str,
)
def test_a_config_that_makes_no_model_is_an_error_in_one_line(wrong, folder, tmp_path, capsys):
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    assert main(["memory", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_quantised_config_is_said_to_be_counted_as_if_it_were_not(folder, tmp_path, capsys):
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    assert main(["memory", "--model", str(tmp_path), "--method", "fira, adamw"]) == 0
    assert "is quantised" in capsys.readouterr().err


def test_inspect_tells_what_is_projected_and_what_a_checkpoint_holds(folder, make_trainer, tmp_path, capsys):
    assert main(["inspect", "--model", folder, "--rank", "4"]) == 0
    assert capsys.readouterr().out.startswith("Fira projects 14 matrices (14 at rank 4)")
    trainer = make_trainer(optim="fira", optim_args="rank=4", save_strategy="steps", save_steps=4, max_steps=4)
    trainer.add_callback(FiraCallback())
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    capsys.readouterr()
    assert main(["inspect", "--model", folder, "--rank", "4", "--checkpoint", str(checkpoint)]) == 0
    *_, predicted, last = capsys.readouterr().out.splitlines()
    held = sum(t.nbytes for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert f"Optimizer state: {held:,} bytes" in predicted
    assert last == f"{checkpoint / 'optimizer.pt'}: {held:,} bytes of state, rank 4, after 4 steps."
    assert main(["inspect", "--model", folder, "--checkpoint", folder]) == 2
    assert "optimizer.pt" in capsys.readouterr().err
    for content in (b"", pickle.dumps(object())):
        (checkpoint / "optimizer.pt").write_bytes(content)
        assert main(["inspect", "--model", folder, "--checkpoint", str(checkpoint)]) == 2
        assert "optimizer.pt is damaged" in capsys.readouterr().err
    for content in ([], {"state": {}}, {"param_groups": [], "state": {0: {"residual_norm": 0}}}):
        torch.save(content, checkpoint / "optimizer.pt")
        assert main(["inspect", "--model", folder, "--checkpoint", str(checkpoint)]) == 2
        assert "holds no state of Fira" in capsys.readouterr().err


def test_inspect_counts_adamws_state_in_the_dtype_of_the_weights(folder, capsys):
    last = []
    for words in ([], ["--dtype", "float32"]):
        assert main(["inspect", "--model", folder, "--rank", "4", *words]) == 0
        last.append(capsys.readouterr().out.splitlines()[-1])
    of_adamw = [int(re.search(r"would be ([\d,]+)", line)[1].replace(",", "")) for line in last]
    assert of_adamw[1] == pytest.approx(2 * of_adamw[0], rel=0.01)


def test_a_preset_of_full_rank_leaves_out_what_has_no_rank_then(folder, capsys):
    assert list(read_json(capsys, "--model", folder, "--preset", "muon-4bit")) == [
        name for name, method in METHODS.items() if method.lora is None
    ]


def test_it_starts_as_a_module(tmp_path):
    as_module = "import runpy; runpy.run_module('fira_hf.cli', run_name='__main__', alter_sys=True)"
    words = ["memory", "--model", LLAMA_7B, "--method", "fira", "--rank", "16"]
    code, out, err = run_quietly(as_module, tmp_path, *words)
    assert (code, err) == (0, "")
    assert "27.30" in out


def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = SHOWN.findall((ROOT / "docs/memory.md").read_text(encoding="utf-8"))
    assert shown
    for command, output in shown:
        assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("method", ["adamw-full", "fira-full", "fira-on-lora", "fira-on-qlora", "lora", "galore-full"])
def test_the_dry_run_of_the_recipe_says_the_same(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(Path(LLAMA_7B).read_text()) | {"num_hidden_layers": 2}))
    overrides = {"use_cpu": True, "fp16": False, "bf16": False, "dtype": "bfloat16", "output_dir": "out"}
    overrides["model_config"] = str(config)
    path = ROOT / f"recipes/commonsense/experiments/llama7b/{method}.yaml"
    arguments, training = train.parse(load_settings(train.RECIPE, path, overrides))
    arguments.cutoff_len, training.per_device_train_batch_size, training.gradient_checkpointing = 8, 1, False
    training.gradient_accumulation_steps = 1
    if "lora" in method:
        arguments.lora_dropout = 0.0  # PEFT's default
    model = shapes(arguments)
    dry = predict_dry_run(model, arguments, training)
    capsys.readouterr()
    name = method.removesuffix("-full")
    words = ["--model", str(config), "--method", name, "--rank", "16", "--lora_rank", "32"]
    words += ["--batch_size", "1", "--sequence_length", "8", "--target_modules", *arguments.target_modules]
    assert read_json(capsys, *words)[name]["total"] == dry.total
