"""Checkpoints and other files of a run as a full disk, a broken copy or a kill leave them: named, and passed over."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import commonsense_tiny
import pretraining_tiny
from conftest import run_recipe
from fira_hf.callbacks import read_record
from recipes import checkpoints, errors, files, models, rundir
from recipes.commonsense import compare, report, train
from recipes.pretraining import train as pretraining

run = functools.partial(run_recipe, train)


class Killed(BaseException):
    """What a process that is killed cannot catch either."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_middle(path: Path) -> None:
    """As a copy leaves it that reserves the whole file and stops on the way."""
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(200) + content[half + 200 :])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def train_and_keep(recipe, preset: Path, method: str, folder: Path, *words: str) -> Path:
    """A run that is killed when it has trained: its checkpoints are those of steps 4, 8 and 12, and of the last."""

    def kill(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.launch.validate", kill)
        with pytest.raises(Killed):
            recipe.main([str(preset / f"{method}.yaml"), "--output_dir", str(folder), "--save_steps", "4", *words])
    return folder


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    data = commonsense_tiny.write_data(folder / "data")
    return commonsense_tiny.write_preset(folder / "tiny", commonsense_tiny.write_model(folder / "model"), data)


@pytest.fixture(scope="module")
def saved(preset, tmp_path_factory) -> dict[str, Path]:
    """Folders of killed runs by method."""
    folders = {method: tmp_path_factory.mktemp("saved") / method for method in ("fira-full", "lora")}
    return {method: train_and_keep(train, preset, method, folder) for method, folder in folders.items()}


@pytest.fixture
def killed(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved["fira-full"], tmp_path / "killed"))


def test_what_the_trainer_saves_is_complete(saved):
    for folder in saved.values():
        assert [path.name for path in rundir.checkpoints(folder)] == [f"checkpoint-{n}" for n in (14, 12, 8, 4)]
        assert checkpoints.newest(folder) == (folder / "checkpoint-14", {})


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "adapter_model.safetensors"])
def test_a_checkpoint_with_a_damaged_file_is_not_complete(saved, tmp_path, name, damage):
    folder = saved["lora" if name.startswith("adapter") else "fira-full"]
    checkpoint = Path(shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4"))
    DAMAGES[damage](checkpoint / name)
    assert name in checkpoints.flaw(checkpoint)
    if damage in ("missing", "empty"):
        assert damage in checkpoints.flaw(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_what_torch_would_load_with_other_numbers_is_found(saved, tmp_path, name):
    checkpoint = Path(shutil.copytree(saved["fira-full"] / "checkpoint-4", tmp_path / "checkpoint-4"))
    overwrite_middle(checkpoint / name)
    assert f"{name} cannot be read (" in checkpoints.flaw(checkpoint)


def test_a_resume_needs_what_is_in_other_forms_and_of_other_processes(saved, tmp_path):
    """The files of two processes, sharded weights, and the scale of fp16."""
    checkpoint = Path(shutil.copytree(saved["fira-full"] / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert checkpoints.flaw(checkpoint, fp16=True) == "scaler.pt is missing"
    state = files.read_json(checkpoint / rundir.STATE)
    attributes = state["stateful_callbacks"]["StepTime"]["attributes"]
    assert attributes["processes"] == 1
    attributes["processes"] = 3
    files.write_json(checkpoint / rundir.STATE, state)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert checkpoints.flaw(checkpoint) == "rng_state_2.pth is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_2.pth")
    assert checkpoints.flaw(checkpoint) is None

    files.write_json(checkpoint / "model.safetensors.index.json", {"weight_map": {"a": "1.safetensors"}})
    assert checkpoints.flaw(checkpoint).startswith("model.safetensors.index.json cannot be read (")
    assert "1.safetensors" in checkpoints.flaw(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "1.safetensors")
    assert checkpoints.flaw(checkpoint) is None
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"")
    assert checkpoints.flaw(checkpoint) == "pytorch_model_fsdp_0/.metadata is empty"


def test_shards_are_as_long_as_their_metadata_says(tmp_path):
    import torch
    from torch.distributed import checkpoint as dcp

    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        dcp.save({"x": torch.ones(1000)}, checkpoint_id=tmp_path / name, no_dist=True)
    assert checkpoints.damaged_file(tmp_path) is None
    (shard,) = (tmp_path / "optimizer_0").glob("*.distcp")
    content = shard.read_bytes()
    for damaged in (content[:-1000], b""):
        shard.write_bytes(damaged)
        assert checkpoints.damaged_file(tmp_path).startswith("optimizer_0/.metadata cannot be read (")
        assert shard.name in checkpoints.damaged_file(tmp_path)
    shard.unlink()
    assert shard.name in checkpoints.damaged_file(tmp_path)


def test_a_run_goes_on_from_the_newest_checkpoint_that_can_be_read(preset, saved, killed, tmp_path, capsys):
    intact = Path(shutil.copytree(saved["fira-full"], tmp_path / "intact"))
    whole = run(preset, "fira-full", intact, "--save_steps", "4")
    assert whole["passed_over_checkpoints"] == {}
    (killed / "checkpoint-14" / "optimizer.pt").unlink()
    cut(killed / "checkpoint-12" / "scheduler.pt")
    overwrite_middle(killed / "checkpoint-8" / "optimizer.pt")
    (killed / "checkpoint-16").mkdir()  # as a kill in the middle of saving leaves it
    shutil.copytree(killed / "checkpoint-4", killed / "checkpoint-4-copy")  # a user's own
    capsys.readouterr()
    resumed = run(preset, "fira-full", killed, "--save_steps", "4")
    out = capsys.readouterr().out
    assert "Continuing from " in out and "checkpoint-4\n" in out
    passed_over = resumed["passed_over_checkpoints"]
    assert list(passed_over) == ["checkpoint-16", "checkpoint-14", "checkpoint-12", "checkpoint-8"]
    assert "not saved to the end" in passed_over["checkpoint-16"]
    assert passed_over["checkpoint-14"] == "optimizer.pt is missing"
    assert passed_over["checkpoint-12"].startswith("scheduler.pt cannot be read (BadZipFile")
    assert passed_over["checkpoint-8"].startswith("optimizer.pt cannot be read (")
    for name, reason in passed_over.items():
        assert f"{name}: {reason}" in out
    for key in ("accuracy", "eval_loss", "train_loss", "steps"):
        assert resumed[key] == whole[key], key
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-4-copy"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("optimizer.pt", "empty"), ("optimizer.pt", "cut"), ("scheduler.pt", "empty"), ("model.safetensors", "cut")],
)
def test_where_no_checkpoint_is_left_the_error_names_the_file_and_the_way_out(preset, killed, name, damage, capsys):
    for checkpoint in rundir.checkpoints(killed):
        DAMAGES[damage](checkpoint / name)
    result = run(preset, "fira-full", killed, "--save_steps", "4")
    said = capsys.readouterr().err
    for text in (said, result["error"]):
        for step in (4, 8, 12, 14):
            assert f"checkpoint-{step}: {name} " in text
        assert re.search(r"Delete \S+/killed to begin anew", text)


def test_a_run_killed_while_it_saved_its_first_checkpoint_begins_anew(preset, killed, capsys):
    for checkpoint in rundir.checkpoints(killed):
        if checkpoint.name == "checkpoint-4":
            (checkpoint / rundir.STATE).unlink()
        else:
            shutil.rmtree(checkpoint)
    result = run(preset, "fira-full", killed, "--save_steps", "4")
    assert (result["status"], list(result["passed_over_checkpoints"])) == ("ok", ["checkpoint-4"])
    out = capsys.readouterr().out
    assert "checkpoint-4: it was not saved to the end" in out and "Continuing from" not in out


def test_the_pretraining_recipe_passes_damaged_checkpoints_over(tmp_path):
    preset = pretraining_tiny.write_preset(tmp_path / "tiny")
    words = ["--save_steps", "4", "--analysis_steps", "2"]
    folder = train_and_keep(pretraining, preset, "fira", tmp_path / "killed", *words)
    shutil.copytree(folder, tmp_path / "intact")
    shutil.copytree(folder, tmp_path / "record")
    whole = run_recipe(pretraining, preset, "fira", tmp_path / "intact", *words)
    assert whole["steps"] == pretraining_tiny.STEPS  # none was made after the last
    cut(folder / "checkpoint-12" / "model.safetensors")
    resumed = run_recipe(pretraining, preset, "fira", folder, *words)
    assert list(resumed["passed_over_checkpoints"]) == ["checkpoint-12"]
    assert (resumed["perplexity"], resumed["train_loss"]) == (whole["perplexity"], whole["train_loss"])
    for name in ("analysis.json", "analysis.npy"):
        assert (folder / name).read_bytes() == (tmp_path / "intact" / name).read_bytes()
    # What is neither a checkpoint nor to be passed over: the record that the run goes on with.
    for name, damage in (("analysis.npy", "cut"), ("analysis.npy", "empty"), ("analysis.json", "cut")):
        folder = Path(shutil.copytree(tmp_path / "record", tmp_path / f"{name}-{damage}"))
        DAMAGES[damage](folder / name)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_record(folder)
    failed = run_recipe(pretraining, preset, "fira", tmp_path / "analysis.npy-cut", *words)
    assert "analysis.npy is damaged, and with it the record of AnalysisCallback: train anew" in failed["error"]


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_damaged_records_of_a_run_are_named(preset, saved, tmp_path, damage, capsys):
    words = [str(preset / "fira-full.yaml"), "--save_steps", "4", "--output_dir"]
    done = Path(shutil.copytree(saved["fira-full"], tmp_path / "comparison" / "fira-full-seed42"))
    assert train.main([*words, str(done)]) == 0
    of_compare = [str(preset), "--output_dir", str(tmp_path / "comparison"), "--methods", "fira-full"]
    other = tmp_path / "comparison" / "lora-seed42" / rundir.RESULT  # which this comparison only reports on
    files.write_json(other, {})
    files.write_json(done / rundir.SETTINGS, files.read_json(done / rundir.SETTINGS) | {"seed": 42})
    DAMAGES[damage](other)
    capsys.readouterr()
    assert compare.main([*of_compare, "--save_steps", "4"]) == 2
    assert "lora-seed42/result.json is not valid JSON" in capsys.readouterr().err
    other.unlink()
    DAMAGES[damage](done / rundir.RESULT)
    assert train.main([*words, str(done)]) == 2
    assert "result.json is not valid JSON" in (said := capsys.readouterr().err) and "Delete it" in said
    assert compare.main([*of_compare, "--save_steps", "4"]) == 2
    assert "result.json is not valid JSON" in capsys.readouterr().err
    assert report.main([str(tmp_path / "comparison")]) == 2
    assert "result.json is not valid JSON" in capsys.readouterr().err

    begun = Path(shutil.copytree(saved["fira-full"], tmp_path / "begun"))
    DAMAGES[damage](begun / rundir.SETTINGS)
    assert train.main([*words, str(begun)]) == 2
    said = capsys.readouterr().err
    assert "settings.json is not valid JSON" in said and "delete it to begin anew" in said

    merged = tmp_path / "merged" / "results.json"
    files.write_json(merged, {"runs": []})
    DAMAGES[damage](merged)
    assert report.main([str(merged)]) == 2
    assert f"{merged} is not valid JSON" in capsys.readouterr().err


def test_no_error_is_empty(preset, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise EOFError

    monkeypatch.setattr(train, "score", fail)
    result = run(preset, "fira-full", tmp_path, "--max_steps", "1")
    assert result["error"] == "EOFError"
    assert "\nerror: EOFError\n" in capsys.readouterr().err
    assert errors.named(ValueError("rank")) == "ValueError: rank"
    assert errors.refuse(OSError()) == 2
    assert capsys.readouterr().err == "error: OSError\n"


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_copy_of_the_converted_model_is_converted_again(preset, tmp_path, monkeypatch, damage, capsys):
    (tmp_path / "llm_tiny").mkdir()
    (tmp_path / "llm_tiny" / "__init__.py").touch()
    (tmp_path / "llm_tiny" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "llm_tiny")
    monkeypatch.setenv("FIRA_HF_CACHE", str(tmp_path / "cache"))
    converted = []

    class Pool:  # the conversion is another library's, in a process of its own
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, convert, file, target):
            converted.append(file.name)
            shutil.copytree(preset.parent / "model", target)
            return self

        def result(self):
            pass

    monkeypatch.setattr(models, "ProcessPoolExecutor", Pool)
    weights = Path(models.embedded_model(), "model.safetensors")
    models.embedded_model()
    assert converted == ["tiny.gguf"]
    DAMAGES[damage](weights)
    models.load_model(models.EMBEDDED, "float32")
    assert converted == ["tiny.gguf", "tiny.gguf"]
    assert f"{weights.parent} is damaged: model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "The weights of .* are damaged: model.safetensors cannot be read"),
        ("config.json", "The model .* cannot be loaded. .*config.json"),
    ],
)
def test_a_damaged_model_is_named(preset, tmp_path, name, words):
    folder = Path(shutil.copytree(preset.parent / "model", tmp_path / "model"))
    cut(folder / name)
    with pytest.raises((ValueError, OSError), match=words):
        models.load_model(str(folder), "float32")
