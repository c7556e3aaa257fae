"""Several runs of a recipe at once: the limit, where their output goes, and what becomes of one that fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from recipes import files, runner
from recipes.commonsense import compare
from recipes.pretraining import search
from recipes.runner import Run, execute

SCRIPT = """
import json, sys, time
from pathlib import Path
folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
print("a word of", folder.name)
print("and an error", file=sys.stderr)
assert sys.argv[3:] in ([], ["--disable_tqdm", "true"])
(folder / "begun").touch()
deadline = time.time() + 30
while len(list(folder.parent.glob("*/begun"))) < wanted:  # until so many run at once
    assert time.time() < deadline
    time.sleep(0.01)
if folder.name == "bad":
    sys.exit(3)
(folder / "result.json").write_text(json.dumps({"status": "ok"}))
"""


@pytest.fixture
def make_runs(tmp_path):
    def make(*names: str, wanted: int = 1) -> list[Run]:
        runs = []
        for name in names:
            folder = tmp_path / name
            folder.mkdir()
            command = [sys.executable, "-c", SCRIPT, str(folder), str(wanted)]
            runs.append(Run(name, command, {"method": "lora"}, folder))
        return runs

    return make


def test_parallel_runs_overlap_and_write_into_their_folders(make_runs, capfd):
    runs = make_runs("one", "bad", "two", wanted=3)  # each waits for the others
    assert [run.name for run in execute(runs, parallel=3)] == ["bad"]
    printed = capfd.readouterr().out
    assert "a word of" not in printed
    for line in ("1 of 3: one begins", "1 of 3: one is complete", "bad failed: ended with exit status 3"):
        assert line in printed
    assert "its error is in log.txt" in files.read_json(runs[1].folder / "result.json")["error"]
    assert sorted((runs[0].folder / "log.txt").read_text().splitlines()) == ["a word of one", "and an error"]


def test_no_more_run_at_once_than_was_said(make_runs, monkeypatch):
    now, most = [0], [0]
    original = runner._execute

    def watched(*arguments):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        done = original(*arguments)
        now[0] -= 1
        return done

    monkeypatch.setattr(runner, "_execute", watched)
    assert execute(make_runs("a", "b", "c", "d"), parallel=2) == []
    assert most == [2]


def test_one_run_at_a_time_prints_on_the_terminal(make_runs, capfd):
    (run,) = make_runs("one")
    assert execute([run]) == []
    assert "a word of one" in capfd.readouterr().out
    assert not (run.folder / "log.txt").exists()


@pytest.mark.parametrize("command", [compare.main, search.main])
def test_a_limit_below_one_is_refused(command, tmp_path: Path, capsys):
    values = ["--values", "learning_rate=1"] if command is search.main else []
    preset = "tiny" if command is search.main else "smoke"
    assert command([preset, "--output_dir", str(tmp_path), *values, "--parallel", "0"]) == 2
    assert "parallel is 0; it must be at least 1" in capsys.readouterr().err
