"""The pre-training recipe from end to end, on a LLaMA of two tiny layers: train, restart, resume, compare, search."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import kill_recipe, run_recipe
from pretraining_tiny import BATCH, CONFIG, LENGTH, METHODS, STEPS, stopped_after_8_steps, write_preset
from recipes.pretraining import compare, report, search, train
from recipes.pretraining.settings import ADAMW, RECIPE
from recipes.relora import Restarts, add_lora, restart

run = functools.partial(run_recipe, train)
DENSE = 2 * 300 * 32 + 5 * 32  # embeddings, output head, norms
MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 80)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    return write_preset(tmp_path_factory.mktemp("pretraining") / "tiny")


def curve(result: dict) -> list[tuple]:
    kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "num_input_tokens_seen")
    return [tuple(entry.get(key) for key in kept) for entry in result["history"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_records_what_it_did(preset, method, tmp_path):
    if method in ("galore", "apollo"):
        pytest.importorskip({"galore": "galore_torch", "apollo": "apollo_torch"}[method])
    result = run(preset, method, tmp_path)
    assert (result["status"], result["steps"], result["method"]) == ("ok", STEPS, method)
    assert result["parameters"] == DENSE + MATRICES
    lora = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 80))  # two layers, rank 4
    assert result["trainable_parameters"] == DENSE + (lora if RECIPE.methods[method].lora else MATRICES)
    assert result["training_tokens"] == STEPS * BATCH * LENGTH
    assert result["tokens_per_second"] == pytest.approx(result["training_tokens"] / result["train_seconds"])
    assert result["history"][-2]["num_input_tokens_seen"] == result["training_tokens"]
    assert result["peak_memory"]["bytes"] > 1e8
    assert result["train_loss"] < result["history"][0]["loss"] - 0.3
    evaluations = [entry for entry in result["history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [6, 12]
    for entry in [*evaluations, result]:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
    assert result["eval_loss"] == evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert ("fira_limiter_active" in result["history"][0]) == (method in ("fira", "flora"))
    if method == "flora":
        assert all(entry["fira_residual_share"] == 0 for entry in result["history"] if "loss" in entry)
    adamw_state = 2 * 4 * result["trainable_parameters"]
    if RECIPE.methods[method].optimizers == ADAMW:
        assert result["optimizer_state_bytes"] == pytest.approx(adamw_state, rel=1e-2)
    else:
        assert result["optimizer_state_bytes"] < adamw_state
    assert result["provenance"]["versions"].keys() >= {"torch", "transformers", "peft", "fira_hf"}
    assert not list(tmp_path.glob("checkpoint-*"))

    # The kept model is a plain LLaMA, adapters merged, and has the loss that is reported.
    model, loading = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    tokens = torch.tensor(tokenizer((preset / "text" / "valid.txt").read_text())["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    assert result["eval_tokens"] == rows.numel()
    with torch.no_grad():
        assert model(input_ids=rows, labels=rows).loss.item() == pytest.approx(result["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["adamw", "lora"])
def test_two_rates_are_those_of_the_matrices_and_of_the_rest(preset, method, tmp_path):
    """A rate of zero for one of the two leaves it as it began, and the schedule scales both."""
    words = ["--max_steps", "2", "--lr_scheduler_type", "linear"]
    models = {}
    for name, rates in {"none": "0 0", "matrices": "1e-2 0", "rest": "0 1e-2"}.items():
        rate, dense = rates.split()
        run(preset, f"{method}-two-rates", tmp_path / name, *words, "--learning_rate", rate, "--dense_lr", dense)
        models[name] = LlamaForCausalLM.from_pretrained(tmp_path / name / "model")
    start = dict(models.pop("none").named_parameters())
    for name, model in models.items():
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
        projected = {key for key in start if "attn" in key or "mlp" in key}
        assert moved == (projected if name == "matrices" else start.keys() - projected)


def test_fira_projects_the_matrices_of_attention_and_mlp(preset, tmp_path, capsys):
    run(preset, "fira", tmp_path, "--max_steps", "1", "--keep_model", "false")
    assert f"Fira projects 14 matrices (14 at rank 4) with {MATRICES:,} of" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def pretrained(preset, tmp_path_factory) -> list[str]:
    """Words that go on from a model that has learned the preset's text, with another text."""
    folder = tmp_path_factory.mktemp("pretrained")
    run(preset, "adamw", folder / "run", "--max_steps", "60")
    new = folder / "new"
    new.mkdir()
    lines = [f"Yesterday {n} was far above {n - 5}, they said.\n" for n in range(900, 1100)]
    (new / "train.txt").write_text("".join(lines[:160]))
    (new / "valid.txt").write_text("".join(lines[160:]))
    words = ["--model_config", "null", "--model", str(folder / "run" / "model"), "--data_dir", str(new)]
    return [*words, "--other_data_dir", str(preset / "text")]


def test_a_pretrained_model_learns_the_new_text_and_forgets_the_old(preset, pretrained, tmp_path):
    result = run(preset, "fira", tmp_path / "fira-seed42", *pretrained)
    learned = json.loads(Path(pretrained[3]).parent.joinpath("result.json").read_text())
    assert result["other_loss_before"] == pytest.approx(learned["eval_loss"], rel=1e-5)  # same tokens, same weights
    assert result["eval_loss"] < result["eval_loss_before"] - 0.5
    assert result["other_loss"] > result["other_loss_before"] + 0.1
    assert (result["history"][0]["step"], result["history"][0]["eval_loss"]) == (0, result["eval_loss_before"])

    # What is kept has the losses that are reported, with the tokenizer that it began with.
    kept = [
        *pretrained,
        "--model",
        str(tmp_path / "fira-seed42" / "model"),
        "--learning_rate",
        "0",
        "--max_steps",
        "1",
    ]
    again = run(preset, "adamw", tmp_path / "again", *kept)
    for loss in ("eval_loss", "other_loss"):
        assert again[f"{loss}_before"] == again[loss] == pytest.approx(result[loss], rel=1e-5)

    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| validation loss | gained | other text's loss | forgotten |" in text
    gained, forgotten = (sign * (result[loss] - result[f"{loss}_before"]) for loss, sign in LOSSES)
    assert f"| {result['eval_loss']:.3f} | {gained:.3f} | {result['other_loss']:.3f} | {forgotten:.3f} |" in text


LOSSES = (("eval_loss", -1), ("other_loss", 1))


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_lora_leaves_the_embeddings_of_a_pretrained_model(preset, pretrained, method, tmp_path):
    result = run(preset, method, tmp_path, *pretrained)
    assert result["trainable_parameters"] == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 80))
    assert result["eval_loss"] < result["eval_loss_before"] - 0.1
    before, after = (LlamaForCausalLM.from_pretrained(folder) for folder in (pretrained[3], tmp_path / "model"))
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)


def test_a_run_that_is_resumed_still_knows_the_losses_before(preset, pretrained, tmp_path, monkeypatch):
    whole = run(preset, "fira", tmp_path / "whole", *pretrained)

    with stopped_after_8_steps(monkeypatch):
        run(preset, "fira", tmp_path / "stopped", *pretrained)
    resumed = run(preset, "fira", tmp_path / "stopped", *pretrained)
    assert curve(resumed) == curve(whole)
    for loss in ("eval_loss_before", "eval_loss", "other_loss_before", "other_loss"):
        assert resumed[loss] == whole[loss]


def test_a_restart_merges_the_adapters_and_begins_them_anew():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), embeddings=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    rows = torch.randint(0, 300, (4, LENGTH))
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.model.layers[0].mlp.up_proj
    a, b, base = (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight)
    expected = base + 8 / 4 * b @ a
    old_a, old_base = a.clone(), base.clone()
    output = model(input_ids=rows).logits

    restart(model, optimizer)
    torch.testing.assert_close(model(input_ids=rows).logits, output)  # merged weights: the adapter's output
    torch.testing.assert_close(base, expected)
    assert (base - old_base).abs().max() > 1e-3
    assert torch.count_nonzero(b) == 0
    assert torch.linalg.matrix_rank(torch.cat([a, old_a])) == 8  # drawn anew
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in named.items() if p not in optimizer.state} == {n for n in named if "lora_" in n}
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    assert optimizer.state[b]["step"] == 1
    assert optimizer.state[model.lm_head.weight]["step"] == 4


def test_relora_restarts_at_its_interval(preset, tmp_path, monkeypatch):
    counts = []

    def count_and_restart(model, optimizer):
        counts.append(optimizer.state[model.lm_head.weight]["step"].item())
        restart(model, optimizer)

    monkeypatch.setattr("recipes.relora.restart", count_and_restart)
    result = run(preset, "relora", tmp_path)
    assert counts == [4, 8]  # not after the last step
    assert min(entry["learning_rate"] for entry in result["history"] if "learning_rate" in entry) == 0.005


def test_every_process_draws_the_same_adapters():
    """Whatever else has drawn random numbers there; and the restart takes none from them."""
    drawn, following = [], []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
        add_lora(model, LoraConfig(r=4, target_modules="all-linear"), embeddings=True)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        before = torch.manual_seed(seed).get_state()
        state = SimpleNamespace(global_step=4, max_steps=12)
        Restarts(4, 2).on_step_end(SimpleNamespace(seed=0), state, None, model=model, optimizer=optimizer)
        following.append(torch.equal(before, torch.get_rng_state()))
        drawn.append(model.model.layers[0].mlp.up_proj.lora_A.default.weight)
    assert torch.equal(*drawn)
    assert all(following)


def test_the_learning_rate_warms_up_after_a_restart_and_then_follows_its_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    Restarts(interval=5, warmup=3).on_train_begin(None, None, None, lr_scheduler=scheduler)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    warm_up = [1, 1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1, 1 / 3, 2 / 3]
    assert rates == pytest.approx([factor * (1 - step / 100) for step, factor in enumerate(warm_up)])


@pytest.mark.parametrize("method", ["fira", "relora"])
def test_a_killed_run_ends_as_if_it_had_not_been(preset, method, tmp_path, capsys):
    """Continued in the middle of a pass over the text, of which there are several in different orders."""
    words = ["--max_steps", "120", "--save_steps", "15", "--save_total_limit", "2", "--eval_steps", "30"]
    records = ("analysis.json", "analysis.npy") if method == "fira" else ()
    words += ["--analysis_steps", "4"] if records else []
    whole = run(preset, method, tmp_path / "whole", *words)
    assert whole["history"][-1]["epoch"] > 2
    kill_recipe(train, preset, method, tmp_path / "killed", *words)
    resumed = run(preset, method, tmp_path / "killed", *words)
    assert "Continuing from" in capsys.readouterr().out
    assert curve(resumed) == curve(whole)
    for key in ("train_loss", "eval_loss", "perplexity", "training_tokens", "optimizer_state_bytes"):
        assert resumed[key] == whole[key]
    for name in records:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_compare_writes_one_report_over_methods_and_seeds(preset, tmp_path, in_this_process):
    words = ["--methods", "adamw,relora", "--seeds", "0,1", "--keep_model", "false", "--max_steps", "8"]
    assert compare.main([str(preset), "--output_dir", str(tmp_path), *words]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(r["method"], r["seed"]) for r in runs] == [("adamw", 0), ("adamw", 1), ("relora", 0), ("relora", 1)]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    first = [r["perplexity"] for r in runs if r["method"] == "adamw"]
    assert f"| adamw | {sum(first) / 2:,.2f} ± " in text
    assert f"with {DENSE + MATRICES:,} parameters" in text
    assert f"{8 * BATCH * LENGTH:,} training tokens in 8 optimizer steps" in text
    assert "- relora: learning_rate" not in text  # shared settings stand once
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text


def test_search_takes_the_lowest_validation_loss(preset, tmp_path, in_this_process, capsys):
    words = ["--methods", "adamw", "--values", "learning_rate=1e-5,1e-2", "--max_steps", "6"]
    assert search.main([str(preset), "--output_dir", str(tmp_path), *words]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert "validation text" in found["minimised"]
    losses = found["methods"]["adamw"]["losses"]
    assert losses["1e-2"] < losses["1e-5"]
    assert found["methods"]["adamw"]["best"] == "1e-2"
    assert not list(tmp_path.glob("*/model"))
