"""The recipes' search, with trainings that end at once: what it keeps of earlier commands, and what is best."""

from __future__ import annotations

import json
import re

import pytest

from recipes import files, report, rundir, runner
from recipes.commonsense import search
from recipes.commonsense.settings import RECIPE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs "train" to a loss of their value: the words' length, or a number's distance from 2e-3."""

    def execute(runs, parallel):
        for run in runs:
            value = re.split("_(?:rate|type)-", run.name)[1]
            loss = len(value) if value.isalpha() else abs(float(value) - 2e-3)
            files.write_json(run.folder / rundir.SETTINGS, run.settings)
            held_out = {"losses": [loss, loss + 2], "fingerprint": "x"}
            files.write_json(run.folder / rundir.RESULT, {"status": "ok", "eval_loss": 9.0, "held_out": held_out})
        return []

    monkeypatch.setattr(runner, "execute", execute)
    return tmp_path


def found(folder, methods, values, *words):
    assert search.main(["smoke", "--output_dir", str(folder), "--methods", methods, "--values", values, *words]) == 0
    return json.loads((folder / "search.json").read_text())["methods"]


def test_a_wider_search_judges_all_values_and_keeps_other_methods(folder):
    first = found(folder, "lora,fira-full", "learning_rate=1e-4,3e-4")
    assert (first["lora"]["best"], first["lora"]["at_the_edge"]) == ("3e-4", True)
    wider = found(folder, "lora", "learning_rate=1e-3,3e-3,6e-3")
    assert set(wider["lora"]["losses"]) == {"1e-4", "3e-4", "1e-3", "3e-3", "6e-3"}
    assert wider["lora"]["best"] in ("1e-3", "3e-3") and not wider["lora"]["at_the_edge"]
    assert wider["lora"]["losses"]["1e-3"] == pytest.approx(1e-3 + 1)  # the mean of the held-out examples
    assert wider["fira-full"] == first["fira-full"]


def test_what_ran_with_other_settings_is_not_beside_it(folder):
    found(folder, "lora", "learning_rate=1e-4,3e-4", "--max_steps", "9")
    assert set(found(folder, "lora", "learning_rate=1e-3")["lora"]["losses"]) == {"1e-3"}


def test_a_run_without_a_result_is_no_value_and_no_crash(folder, monkeypatch):
    """As where another command has put a run of other settings into its folder meanwhile."""
    execute = runner.execute

    def interrupted(runs, parallel):
        execute(runs, parallel)
        (runs[0].folder / rundir.RESULT).unlink()
        return []

    monkeypatch.setattr(runner, "execute", interrupted)
    of_lora = found(folder, "lora", "learning_rate=1e-4,3e-4")["lora"]
    assert (of_lora["losses"]["1e-4"], of_lora["best"]) == (None, "3e-4")


def test_words_have_no_edge(folder):
    of_words = found(folder, "lora", "lr_scheduler_type=linear,cosine,constant")["lora"]
    assert (of_words["best"], of_words["at_the_edge"]) in (("linear", False), ("cosine", False))


def test_runs_of_a_method_with_other_settings_are_not_averaged(tmp_path):
    for seed, rate in (("0", 1e-3), ("1", 1e-5)):
        settings = {"method": "lora", "learning_rate": rate, "seed": seed}
        result = {"status": "ok", "method": "lora", "settings": settings}
        files.write_json(tmp_path / f"lora-seed{seed}" / rundir.RESULT, result)
    with pytest.raises(ValueError, match=r"lora has .* different settings \(learning_rate was 0.001, now 1e-05\)"):
        report.write_report(RECIPE, tmp_path, "title", "caption", lambda runs, where: ([], [], {}))


def test_a_checkpoint_of_unknown_settings_is_not_gone_on_from(tmp_path):
    files.write_json(tmp_path / "checkpoint-3" / rundir.STATE, {})
    with pytest.raises(ValueError, match="has no settings.json"):
        rundir.is_finished(tmp_path, {"seed": 0})
