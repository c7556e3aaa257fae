"""One report from the runs of a comparison: report.md, results.json, loss.png and samples.png.

python -m recipes.diffusion.report runs/unet             from the run folders in it
python -m recipes.diffusion.report docs/x/results.json   from a merged file, into its folder
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes import intervals, report
from recipes.diffusion.data import DIGITS, from_text
from recipes.diffusion.settings import RECIPE
from recipes.plots import plot_losses
from recipes.report import by_method, format_bytes, markdown

REFERENCE = "adamw-full"
COLUMNS: list[report.Column] = [
    ("held-out loss", lambda run: run["eval_loss"], "{:.4f}".format, True),
    ("train loss", lambda run: run["train_loss"], "{:.4f}".format, True),
    ("learning rate", lambda run: run["all_settings"]["learning_rate"], "{:g}".format, False),
    ("trained parameters", lambda run: run["trainable_parameters"], "{:,.0f}".format, False),
    ("optimizer state", lambda run: run["optimizer_state_bytes"], format_bytes, False),
]
PANELS = [("loss", "training loss", "mean squared error of the noise", "log")]


def differences(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> its held-out loss minus that of AdamW, with an interval over the held-out images."""
    of_methods = by_method(runs)
    others = of_methods.pop(REFERENCE, [])
    found = {
        method: intervals.of_losses(*intervals.paired(of_one, others))
        for method, of_one in of_methods.items()
        if others
    }
    return {method: one for method, one in found.items() if one is not None}


def draw_samples(runs: list[dict[str, Any]], path: Path) -> None:
    """The first samples of each method's first run, a row a method, a column a digit, twice as many where it made two
    of each."""
    first = {method: of_one[0]["samples"] for method, of_one in by_method(runs).items()}
    count = max(map(len, first.values()))
    figure = Figure(figsize=(0.45 * count + 1.2, 0.5 * len(first) + 0.3), layout="constrained")
    rows = figure.subplots(len(first), count, squeeze=False)
    for row, (method, images) in zip(rows, first.items(), strict=True):
        for column, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(from_text(images[column]), cmap="gray_r", vmin=0, vmax=15)
        row[0].set_ylabel(method, rotation=0, ha="right", va="center")
    for column, axis in enumerate(rows[0]):
        axis.set_title(str(column % DIGITS), fontsize=9)
    figure.savefig(path, dpi=120)


def describe(runs: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[list[list[str]]], dict[str, Any]]:
    first, table, found = runs[0], report.tabulate(runs, COLUMNS), differences(runs)
    plot_losses(runs, folder / "loss.png", PANELS)
    draw_samples(runs, folder / "samples.png")
    apart = [["method", f"held-out loss minus that of {REFERENCE}", "95% interval"]]
    for method, one in found.items():
        low, high = one["interval"]
        apart.append([method, f"{one['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"])
    notes = (
        "Held-out loss: the mean squared error of the predicted noise, over the held-out images with the same noises "
        "and times for all. Intervals: bootstrap over these images, not over seeds. Optimizer state: bytes of its "
        "tensors after training."
    )
    parts = [
        f"A {first['all_settings']['model']} of {first['parameters']:,} parameters, {first['steps']:,} optimizer "
        f"steps on {first['training_images']:,} images, seeds {report.seeds(runs)}.",
        report.where(runs),
        "",
        *["## Loss and state", "", *markdown(table), "", notes, ""],
        *(["## Beside AdamW", "", *markdown(apart), ""] if found else []),
        *["![Training loss by step](loss.png)", "", "## Samples", "", "![Samples of each method](samples.png)", ""],
        *report.describe_fira(runs),
    ]
    return parts, [table], {"differences": found} if found else {}


def write_report(source: Path) -> None:
    report.write_report(RECIPE, source, "Diffusion: methods compared", "Diffusion", describe)


def main(words: list[str] | None = None) -> int:
    return report.main(write_report, __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
