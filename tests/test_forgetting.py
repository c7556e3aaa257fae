"""What a pretrained model learned and forgot, by learning rate: the table and the picture of the page."""

import json
import shutil
from pathlib import Path

import pytest

from recipes.pretraining import forgetting

COMMITTED = Path(__file__).parent.parent / "docs" / "results" / "continued"


def run(method, rate, new, old):
    settings = {"learning_rate": rate, "seed": 0}
    return {"status": "ok", "method": method, "seed": 0, "settings": settings, "eval_loss": new, "other_loss": old}


def write_runs(folder, *runs):
    about = json.loads((COMMITTED / "results.json").read_text())["runs"][0]
    for number, one in enumerate(runs):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "result.json").write_text(json.dumps(about | one))


def test_the_committed_page_is_made_of_the_committed_figures(tmp_path, capsys):
    shutil.copy(COMMITTED / "results.json", tmp_path)
    forgetting.main([str(tmp_path / "results.json")])
    for name in ("forgetting.md", "results.json"):
        assert (tmp_path / name).read_text() == (COMMITTED / name).read_text()
    assert "before training" in capsys.readouterr().out


def test_a_method_is_a_line_of_rates_in_order(tmp_path, monkeypatch, capsys):
    runs = [run("adamw", "1e-3", 2.0, 4.5), run("lora", "3e-3", 2.5, 4.0), run("adamw", "1e-4", 2.4, 4.1)]
    write_runs(tmp_path, *runs, run("adamw", "1e-2", 3.0, 9.0))
    lines = []
    plot = forgetting.Figure.subplots

    def subplots(figure):
        axis = plot(figure)
        monkeypatch.setattr(axis, "plot", lambda xs, ys, **look: lines.append((look["label"], xs, ys)))
        return axis

    monkeypatch.setattr(forgetting.Figure, "subplots", subplots)
    assert forgetting.main([str(tmp_path)]) == 0
    # What has forgotten nearly all is in the table alone: the others would be one point beside it.
    assert lines == [("adamw", [4.1, 4.5], [2.4, 2.0]), ("lora", [4.0], [2.5])]
    table = (tmp_path / "forgetting.md").read_text()
    assert "| adamw | 1e-2 | 0 | 3.000 | 9.000 |" in table and table.index("1e-4") < table.index("1e-3")


@pytest.mark.parametrize("kept", [{}, {"other_loss": None}])
def test_runs_without_an_old_text_are_refused(kept, tmp_path, capsys):
    if kept:
        write_runs(tmp_path, run("adamw", "1e-3", 2.0, 4.5) | kept)
    assert forgetting.main([str(tmp_path)]) == 2
    assert "holds no " in capsys.readouterr().err
