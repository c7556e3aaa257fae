"""The commonsense recipe from end to end, on a tiny random LLaMA: train, resume, compare, search and report."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

import forks
from commonsense_tiny import WORDS, write_data, write_model, write_preset
from conftest import ROOT, call_main, kill_recipe, run_recipe
from recipes import checkpoints, files, measure
from recipes.commonsense import compare, data, report, scoring, search, train
from recipes.commonsense.model import load_tokenizer
from recipes.commonsense.settings import METHODS
from recipes.models import load_model

run = functools.partial(run_recipe, train)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_preset(folder / "tiny", write_model(folder / "model"), write_data(folder / "data"))


def losses(result: dict) -> list[tuple]:
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in result["history"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_records_what_it_did(preset, method, tmp_path):
    if method.startswith("galore"):
        pytest.importorskip("galore_torch")  # with bitsandbytes, which is not built for every system
    if method.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    result = run(preset, method, tmp_path, "--eval_strategy", "steps", "--eval_steps", "7")
    assert result["status"] == "ok"
    assert result["steps"] == 14
    assert list(result["accuracy"]) == list(WORDS)
    assert result["accuracy"]["boolq"]["questions"] == 4
    assert result["average"] == pytest.approx(sum(task["accuracy"] for task in result["accuracy"].values()) / 8)
    assert result["train_loss"] < result["history"][0]["loss"]
    assert 0 < result["eval_loss"] < 10
    assert [entry["step"] for entry in result["history"] if "eval_loss" in entry] == [7, 14]
    assert result["peak_memory"]["bytes"] > 1e8
    assert result["tokens_per_second"] == pytest.approx(result["training_tokens"] / result["train_seconds"], rel=1e-3)
    assert result["provenance"]["versions"].keys() >= {"torch", "transformers", "peft", "fira_hf"}
    assert result["all_settings"]["learning_rate"] == 1e-3
    assert ("fira_limiter_active" in result["history"][0]) == (
        "fira" in method or "flora" in method or "muon" in method
    )
    if method.startswith("flora"):
        assert all(entry["fira_residual_share"] == 0 for entry in result["history"] if "loss" in entry)
    assert str(tmp_path) not in json.dumps(result).replace(os.path.relpath(tmp_path), "")
    assert not list(tmp_path.glob("checkpoint-*"))

    model = AutoModelForCausalLM.from_pretrained(preset.parent / "model")
    total = sum(p.numel() for p in model.parameters())
    if method.endswith("full"):
        assert result["trainable_parameters"] == total
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    else:
        # A and B of rank 8 around q, v (32 x 32, 16 x 32), k (16 x 32), up (80 x 32), down (32 x 80), two layers.
        lora = 2 * 8 * (64 + 48 + 48 + 112 + 112)
        magnitudes = 2 * (32 + 16 + 16 + 80 + 32)  # of DoRA: one an output
        assert result["trainable_parameters"] == lora + (magnitudes if method == "dora" else 0)
    if method == "relora":  # what the restarts merged is in the weights
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert sum(p.numel() for p in merged.parameters()) == total
        moved = {name for name, p in merged.named_parameters() if not torch.equal(p, model.get_parameter(name))}
        assert {name.split(".")[-2] for name in moved} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
        assert min(entry["learning_rate"] for entry in result["history"] if "learning_rate" in entry) < 5e-4
    elif not method.endswith("full"):
        loaded = PeftModel.from_pretrained(model, tmp_path / "model")
        assert loaded.peft_config["default"].use_dora == (method == "dora")
    adamw_state = 2 * 4 * result["trainable_parameters"]
    if method in ("lora", "qlora", "lora-equal-bytes", "dora", "relora", "adamw-full"):
        assert result["optimizer_state_bytes"] == pytest.approx(adamw_state, rel=1e-2)
    else:
        assert result["optimizer_state_bytes"] < adamw_state


@pytest.mark.parametrize("method", ["fira-full", "lora"])
def test_scores_are_those_of_fp32_where_training_is_in_bf16(preset, method, tmp_path):
    words = ["--max_steps", "2", "--answer_format", "text", "--data_dir", "recipes/commonsense/data"]
    words += ["--max_train_per_task", "6", "--max_test_per_task", "4", "--bf16", "true"]
    result = run(preset, method, tmp_path, *words)
    if method == "lora":
        model = PeftModel.from_pretrained(load_model(str(preset.parent / "model"), "float32"), tmp_path / "model")
    else:
        model = load_model(str(tmp_path / "model"), "float32")
    arguments = train.parse(result["settings"] | {"output_dir": str(tmp_path)})[0]
    tokenizer = load_tokenizer(arguments.model)
    validation = train.encode_validation(data.load_training(arguments)[1], tokenizer, arguments)
    losses = scoring.answer_losses(model, tokenizer, validation, 4)
    assert result["held_out"]["losses"] == pytest.approx(losses, abs=2e-6)
    assert result["accuracy"] == scoring.score(model, tokenizer, data.load_questions(arguments), arguments)
    assert result["eval_loss"] == pytest.approx(statistics.mean(losses), rel=0.1)  # the Trainer's own, in bf16


def test_fira_on_lora_projects_a_and_b_and_fira_full_the_weights(preset, tmp_path, capsys):
    run(preset, "fira-on-lora", tmp_path / "a", "--max_steps", "1")
    assert "Fira projects 20 matrices" in capsys.readouterr().out
    run(preset, "fira-full", tmp_path / "b", "--max_steps", "1")
    assert "Fira projects 10 matrices" in capsys.readouterr().out


def test_evaluations_and_a_resume_change_nothing_on_a_base_of_4_bits(preset, tmp_path, capsys):
    """On CPUs with AVX512-BF16 an evaluation would, by what bitsandbytes makes of the base for it."""
    pytest.importorskip("bitsandbytes")
    words = ["--lora_dropout", "0", "--logging_steps", "1", "--max_steps", "6", "--save_steps", "3"]
    words += ["--tasks", "boolq", "--max_test_per_task", "2", "--val_set_size", "2"]
    whole = run(preset, "fira-on-qlora", tmp_path / "whole", *words)
    words += ["--eval_strategy", "steps", "--eval_steps", "1"]

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.StepTime, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            run(preset, "fira-on-qlora", tmp_path / "stopped", *words)
    resumed = run(preset, "fira-on-qlora", tmp_path / "stopped", *words)
    assert "checkpoint-3" in capsys.readouterr().out
    assert [entry for entry in losses(resumed) if entry[1]] == [entry for entry in losses(whole) if entry[1]]
    assert (resumed["accuracy"], resumed["eval_loss"]) == (whole["accuracy"], whole["eval_loss"])


def test_state_bytes_counts_what_is_inside_objects():
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert measure.state_bytes(optimizer) == 2 * 48 + 4

    class Projector:  # as galore_torch keeps its basis
        ortho_matrix = None

    projector = Projector()
    projector.ortho_matrix = [torch.zeros(3, 2), torch.zeros(1, dtype=torch.bfloat16)]
    optimizer.state[weight]["projector"] = projector
    assert measure.state_bytes(optimizer) == 2 * 48 + 4 + 24 + 2


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="with dropout the Trainer of transformers 4.56 does not resume exactly, with AdamW on LoRA neither",
)
def test_a_run_killed_in_training_ends_as_if_it_had_not_been(preset, tmp_path, capsys):
    method = "fira-on-lora"  # with dropout, so that the state of the random numbers matters
    words = ["--num_train_epochs", "8", "--save_total_limit", "2"]
    whole = run(preset, method, tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    kill_recipe(train, preset, method, killed, *words)
    checkpoint = checkpoints.newest(killed)[0]
    assert int(checkpoint.name.rpartition("-")[2]) < whole["steps"]
    (killed / "checkpoint-9999").mkdir()  # as a kill in the middle of saving leaves it

    resumed = run(preset, method, killed, *words)
    assert f"Continuing from {os.path.relpath(checkpoint)}" in capsys.readouterr().out
    assert losses(resumed) == losses(whole)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["optimizer_state_bytes"] == whole["optimizer_state_bytes"]
    assert resumed["training_tokens"] == whole["training_tokens"]


def test_a_run_stopped_in_scoring_only_scores_again(preset, tmp_path, monkeypatch, capsys):
    whole = run(preset, "fira-full", tmp_path / "whole")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            run(preset, "fira-full", tmp_path / "stopped")
    resumed = run(preset, "fira-full", tmp_path / "stopped")
    assert "checkpoint-14" in capsys.readouterr().out
    assert resumed["accuracy"] == whole["accuracy"]
    assert (resumed["train_loss"], resumed["eval_loss"]) == (whole["train_loss"], whole["eval_loss"])
    assert resumed["tokens_per_second"] > 0


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(preset, tmp_path, capsys):
    run(preset, "lora", tmp_path, "--max_steps", "1")
    before = (tmp_path / "result.json").read_bytes()
    run(preset, "lora", tmp_path, "--max_steps", "1")
    assert "is complete; delete it to run it again" in capsys.readouterr().out
    words = [str(preset / "lora.yaml"), "--output_dir", str(tmp_path), "--max_steps", "1", "--learning_rate", "1e-4"]
    assert train.main(words) == 2
    assert "other settings (learning_rate was 0.001, now 0.0001); choose another output_dir" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == before


def test_a_failure_is_recorded_with_its_error(preset, tmp_path, capsys):
    result = run(preset, "fira-full", tmp_path, "--optim_args", "rank=0")
    assert result["status"] == "failed"
    assert "rank=0" in result["error"]
    assert result["settings"]["optim_args"] == "rank=0"
    assert "Traceback" in (tmp_path / "error.txt").read_text(encoding="utf-8")
    assert "Traceback" not in capsys.readouterr().err
    assert run(preset, "fira-full", tmp_path)["status"] == "ok"  # mended: nothing stands in the way


@pytest.fixture
def in_forks(monkeypatch, tmp_path_factory) -> None:
    """`compare` starts a process for each run, which here are forks."""
    logs = tmp_path_factory.mktemp("logs")

    def call(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[0] == sys.executable
        return forks.run(command[1:], ROOT, logs)

    monkeypatch.setattr("recipes.runner.subprocess", SimpleNamespace(run=call))


def test_compare_survives_a_failure_reports_and_repeats_only_what_failed(preset, tmp_path, in_forks, capfd):
    words = [str(preset), "--output_dir", str(tmp_path), "--methods", "lora,fira-full,adamw-full", "max_steps=4"]
    # A folder in the place of fira-full's settings file makes that run fail before it can record anything.
    obstacle = tmp_path / "fira-full-seed42" / "settings.tmp"
    obstacle.mkdir(parents=True)
    assert compare.main(words) == 0
    printed = capfd.readouterr().out
    assert "fira-full-seed42 failed" in printed
    assert "Failed: fira-full-seed42" in printed
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**fira-full (seed 42) failed**: ended with exit status 1" in text
    assert "| lora | 6,144 |" in text

    obstacle.rmdir()
    first = (tmp_path / "lora-seed42" / "result.json").stat().st_mtime_ns
    assert compare.main(words) == 0
    assert (tmp_path / "lora-seed42" / "result.json").stat().st_mtime_ns == first
    merged = json.loads((tmp_path / "results.json").read_text())["runs"]
    methods = ["before training", "lora", "fira-full", "adamw-full"]
    assert [(r["method"], r["status"]) for r in merged] == [(method, "ok") for method in methods]
    for name in ("loss.png", "accuracy.png", "differences.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "failed" not in text
    assert "## What Fira did" in text
    majority = "| most frequent answer | 50.0 | 50.0 | 50.0 | 25.0 | 50.0 | 25.0 | 25.0 | 25.0 | 37.5 |"
    assert majority in text
    assert str(tmp_path) not in text

    assert compare.main([*words, "learning_rate=1"]) == 2
    assert "other settings (learning_rate was 0.001, now 1)" in capfd.readouterr().err


@pytest.fixture(scope="module")
def compared(preset, tmp_path_factory) -> SimpleNamespace:
    """A comparison in text form, on the recipe's own questions, given twice; what each printed."""
    folder = tmp_path_factory.mktemp("compared")
    words = [str(preset), "--output_dir", str(folder), "--methods", "lora,fira-on-lora,fira-full", "--seeds", "0"]
    words += ["--answer_format", "text", "--data_dir", "recipes/commonsense/data", "--learning_rate", "1e-2"]
    words += ["--max_train_per_task", "6", "--max_test_per_task", "6", "--val_set_size", "16", "--max_steps", "4"]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.runner.subprocess", SimpleNamespace(run=call_main))
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert compare.main(words) == 0
            printed.append(out.getvalue())
    return SimpleNamespace(folder=folder, printed=printed, text=(folder / "report.md").read_text(encoding="utf-8"))


def test_a_comparison_begins_with_the_model_before_training(compared, preset):
    before = files.read_json(compared.folder / "before-training" / "result.json")
    assert (before["status"], before["method"]) == ("ok", "before training")
    assert "learning_rate" not in before["settings"]
    assert f"1 of 4: before training {'─' * 3}" in compared.printed[0]
    assert "complete in" in compared.printed[1].split("2 of 4")[0]
    # The model as it is, whose validation loss the Trainer finds at step 0, too.
    words = ["--answer_format", "text", "--data_dir", "recipes/commonsense/data", "--max_train_per_task", "6"]
    words += ["--max_test_per_task", "0", "--val_set_size", "16", "--max_steps", "1", "--eval_strategy", "steps"]
    result = run(preset, "fira-full", compared.folder.parent / "one", *words, "--eval_on_start", "true")
    assert result["history"][0]["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    tables = [part.splitlines()[2] for part in compared.text.split("| method |")[1:]]
    loss, boolq = statistics.mean(before["held_out"]["losses"]), before["accuracy"]["boolq"]
    assert tables[0] == f"| before training | - | - | - | - | - | {loss:.3f} |"
    # BoolQ, SIQA and WinoGrande are counted by acc, as the harness does; a table has all by acc.
    raw = [before["accuracy"][task]["acc"]["accuracy"] for task in WORDS]
    norm = [before["accuracy"][task]["accuracy"] for task in WORDS]
    assert boolq["accuracy"] != boolq["acc"]["accuracy"]  # else the test cannot tell
    mixed = [raw[0], norm[1], raw[2], norm[3], raw[4], *norm[5:]]
    assert before["average"] == pytest.approx(statistics.mean(mixed))
    for table, shares in ((tables[2], mixed), (tables[3], raw)):
        shown = " | ".join(f"{100 * share:.1f}" for share in [*shares, statistics.mean(shares)])
        assert table == f"| before training | {shown} |"
    assert "as it is (`acc`) on boolq, social_i_qa, winogrande and divided by its length in" in compared.text


def test_a_comparison_reports_differences_question_by_question(compared):
    merged = files.read_json(compared.folder / "results.json")
    pairs = [(one["method"], one["minus"]) for one in merged["differences"]]
    methods = ["lora", "fira-on-lora", "fira-full"]
    of_before, of_lora = [(one, "before training") for one in methods], [(one, "lora") for one in methods[1:]]
    assert pairs == [*of_before, *of_lora, ("fira-on-lora", "fira-full")]
    full = merged["differences"][2]
    by_method = {one["method"]: one for one in merged["runs"]}
    average = by_method["fira-full"]["average"] - by_method["before training"]["average"]
    assert full["accuracy"]["difference"] == pytest.approx(average)
    low, high = full["loss"]["interval"]
    assert low <= full["loss"]["difference"] <= high < 0
    assert f"| fira-full | before training | {100 * average:+.1f} | " in compared.text
    assert "By held-out loss: " in compared.text
    assert re.search(r"By held-out loss: .*fira-full below before training", compared.text)
    for one in merged["runs"]:
        assert one["accuracy"]["piqa"]["accuracy"] == one["accuracy"]["piqa"]["right"].count("1") / 6
        assert len(one["held_out"]["losses"]) == 16


def test_the_printed_table_fits_a_terminal_of_100_columns(compared):
    table = compared.printed[0].split("Accuracy in percent")[1].split("Report:")[0].splitlines()
    assert max(map(len, table)) <= 100
    rows = [re.split(r"  +", line.strip()) for line in table if line.strip()]
    titles = [row[0] for row in rows]
    # Nothing but long headings falls into two lines.
    assert titles.count("95% interval") == 6
    assert [title for title in titles if title.startswith(("accuracy", "loss"))] == [
        "accuracy - before",
        "loss - before",
        "accuracy - lora",
        "loss - lora",
        "accuracy - fira-full",
        "loss - fira-full",
    ]
    body = titles[titles.index("trained parameters") :]
    assert all(title[0].isalpha() or title == "95% interval" for title in body)


def test_methods_are_reported_where_the_model_before_training_failed(preset, tmp_path):
    run(preset, "lora", tmp_path / "lora-seed42", "--max_steps", "1", "--max_test_per_task", "1")
    failed = {"status": "failed", "error": "no memory", "method": "before training", "settings": {}}
    files.write_json(tmp_path / "before-training" / "result.json", failed)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**before training failed**: no memory" in text
    assert "## Differences" not in text
    assert "| lora | 6,144 |" in text


def test_compare_fails_when_every_method_does(preset, tmp_path, in_this_process, capfd):
    words = [str(preset), "--output_dir", str(tmp_path), "--methods", "lora", "--data_dir", str(tmp_path / "none")]
    assert compare.main(words) == 1
    assert "There is no data file" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "There is no data file" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "There is no preset 'nowhere'; there are llama7b, smoke, smollm2"),
        (["smoke", "--methods", "lora,adam"], "Preset smoke has no method 'adam'; it has lora, fira-on-lora"),
        (["smoke", "--seed", "1"], "The seed is set by --seeds"),
        (["smoke", "x"], "'x' is not a setting; write --key value or key=value"),
    ],
)
def test_compare_refuses_bad_words_before_it_runs_anything(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing may run"))
    assert compare.main([*words, "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_killed_by_the_system_is_recorded(preset, tmp_path, monkeypatch, capfd):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert compare.main([str(preset), "--output_dir", str(tmp_path), "--methods", "lora"]) == 1
    assert "most likely for want of memory" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_search_takes_the_lowest_validation_loss(preset, tmp_path, in_this_process, capfd):
    values = "learning_rate=1e-5,1e-2"
    words = [
        str(preset),
        "--output_dir",
        str(tmp_path),
        "--methods",
        "fira-full",
        "--values",
        values,
        "--max_steps",
        "6",
    ]
    assert search.main(words) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["setting"] == "learning_rate"
    assert "response's tokens" in found["minimised"]
    of_method = found["methods"]["fira-full"]
    assert of_method["losses"]["1e-2"] < of_method["losses"]["1e-5"]
    assert (of_method["best"], of_method["at_the_edge"]) == ("1e-2", True)
    result = json.loads((tmp_path / "fira-full-learning_rate-1e-2" / "result.json").read_text())
    assert result["accuracy"] == {}
    assert "at the edge" in capfd.readouterr().out.replace("\n", " ")


def test_report_averages_seeds_and_comes_from_a_merged_file_too(preset, tmp_path, capsys):
    for seed in ("0", "1"):
        run(preset, "lora", tmp_path / f"lora-seed{seed}", "--seed", seed, "--max_steps", "4")
    assert report.main([str(tmp_path)]) == 0
    first = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "seeds 0, 1" in first
    row = next(line for line in first.splitlines() if line.startswith("| lora |"))
    merged = json.loads((tmp_path / "results.json").read_text())["runs"]
    mean = sum(result["train_loss"] for result in merged) / 2
    assert f"| {mean:.3f} ± " in row

    copy = tmp_path / "copy" / "results.json"
    files.write_json(copy, json.loads((tmp_path / "results.json").read_text()))
    assert report.main([str(copy)]) == 0
    assert (copy.parent / "report.md").read_text(encoding="utf-8") == first
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_unanswered_questions_are_reported_for_generation(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "extract_answer", lambda response, task: "")
    words = ["--max_steps", "1", "--scoring", "generate", "--tasks", "boolq", "--val_set_size", "0"]
    result = run(preset, "lora", tmp_path / "lora", *words)
    assert result["accuracy"]["boolq"]["unanswered"] == 1
    assert result["eval_loss"] is None
    assert report.main([str(tmp_path)]) == 0
    assert "| lora: no answer | 100.0 | 100.0 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
