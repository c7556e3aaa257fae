"""What a pretrained model learned of a new text, beside what it forgot of the old one, by method and learning rate.

python -m recipes.pretraining.forgetting runs/continued             from the run folders in it
python -m recipes.pretraining.forgetting docs/x/results.json        from a merged file, into its folder

Writes forgetting.md, forgetting.png and results.json. A higher rate learns more and forgets more, so methods are
compared along a line of rates: the one that lies lower learned more for what it forgot.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes import files, report
from recipes.plots import STYLES
from recipes.pretraining.settings import RECIPE
from recipes.report import format_bytes, markdown

PICTURE, PAGE = "forgetting.png", "forgetting.md"
MOST = 1.36  # nats of the old text that a run in the picture may have lost


def load(source: Path) -> list[dict[str, Any]]:
    """Finished runs of a pretrained model, by method and then by rate; ValueError where there are none."""
    runs = [run for run in report.load_results(RECIPE, source) if run.get("other_loss") is not None]
    if not runs:
        raise ValueError(f"{source} holds no run that has an other_data_dir, by which forgetting is measured.")
    order = list(RECIPE.methods)
    return sorted(runs, key=lambda run: (order.index(run["method"]), _rate(run), run["seed"]))


def _rate(run: dict[str, Any]) -> float:
    return float(run["settings"]["learning_rate"])


def _as_word(rate: float) -> str:
    """1e-3, as in the experiments."""
    return f"{rate:.0e}".replace("e-0", "e-")


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["method", "learning rate", "seed", "new text's loss", "old text's loss", "optimizer state"]]
    rows.append(
        ["before training", "", "", f"{runs[0]['eval_loss_before']:.3f}", f"{runs[0]['other_loss_before']:.3f}", ""]
    )
    for run in runs:
        cells = [
            run["method"],
            _as_word(_rate(run)),
            str(run["seed"]),
            f"{run['eval_loss']:.3f}",
            f"{run['other_loss']:.3f}",
        ]
        rows.append([*cells, format_bytes(run["optimizer_state_bytes"])])
    return rows


def is_shown(run: dict[str, Any]) -> bool:
    """Whether a run is in the picture: those that forget far more would leave no room for the others."""
    return bool(run["other_loss"] - run["other_loss_before"] <= MOST)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A line a method over its rates, of the runs that are shown."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    for number, (method, of_method) in enumerate(groupby(runs, key=lambda run: run["method"])):
        shown = [run for run in of_method if is_shown(run)]
        colour, marker = STYLES.get(method, ("#333333", "o"))
        xs, ys = [run["other_loss"] for run in shown], [run["eval_loss"] for run in shown]
        axis.plot(xs, ys, color=colour, marker=marker, label=method)
        for run in shown:
            where, side = (run["other_loss"], run["eval_loss"]), (-5, -10) if number % 2 else (5, 4)
            look = {"fontsize": 8, "color": colour, "horizontalalignment": "right" if number % 2 else "left"}
            axis.annotate(_as_word(_rate(run)), where, side, textcoords="offset points", **look)
    axis.axvline(runs[0]["other_loss_before"], color="0.5", linestyle=":", label="before training")
    axis.text(0.01, 0.01, "lower left: better", transform=axis.transAxes, fontsize=9, color="0.4")
    axis.set(xlabel="loss on the old text, nats a token: to the right, more is forgotten")
    axis.set(ylabel="loss on the new text: below, more is learned", title="learned and forgotten, by learning rate")
    axis.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)


def write(source: Path) -> None:
    folder = source if source.is_dir() else source.parent
    runs = load(source)
    first, rows = runs[0], table(runs)
    texts = [first["all_settings"][key] for key in ("data_dir", "other_data_dir")]
    lines = [
        "# What is learned and what is forgotten",
        "",
        f"{first['all_settings']['model']} goes on with {texts[0]}, {first['training_tokens']:,} tokens in "
        f"{first['steps']} optimizer steps; the old text is {texts[1]}. Losses in nats a token, after the last step, "
        f"on {first['eval_tokens']:,} and {first['other_tokens']:,} tokens.",
        report.where(runs),
        "",
        *markdown(rows),
        "",
        f"![Learned and forgotten]({PICTURE})",
    ]
    hidden = ", ".join(f"{run['method']} at {_as_word(_rate(run))}" for run in runs if not is_shown(run))
    if hidden:
        lines += ["", f"Not in the picture, since they forget more than {MOST} nats: {hidden}."]
    draw(runs, folder / PICTURE)
    files.write_json(folder / report.MERGED, {"runs": runs})
    (folder / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(markdown(rows)))


def main(words: list[str] | None = None) -> int:
    return report.main(write, __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
