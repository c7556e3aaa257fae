"""The pictures of a report that only this recipe has."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.commonsense.tasks import TASKS, counted
from recipes.plots import BEFORE_LINE, STYLES
from recipes.settings import BEFORE


def plot_accuracy(runs: list[dict[str, Any]], path: Path, before: dict[str, Any] | None = None) -> None:
    """Accuracy by task and on average (means over seeds), beside the share of the most frequent answer and what the
    model reaches before training.
    """
    tasks = [task for task in TASKS if all(task in run["accuracy"] for run in runs)]
    methods = [method for method in STYLES if any(run["method"] == method for run in runs)]
    width = 0.8 / len(methods)
    figure = Figure(figsize=(max(7.0, 1.35 * (len(tasks) + 1)) + 2, 4.4), layout="constrained")
    axis = figure.subplots()
    for index, method in enumerate(methods):
        of_one = [run for run in runs if run["method"] == method]
        heights = [100 * statistics.mean(_share(run, task) for run in of_one) for task in tasks]
        heights.append(statistics.mean(heights))
        places = [place + (index + 0.5) * width - 0.4 for place in range(len(heights))]
        axis.bar(places, heights, width, color=STYLES[method][0], label=method)
    _line(axis, [runs[0]["accuracy"][task]["majority"] for task in tasks], "most frequent answer", color="black")
    if before is not None and all(task in before["accuracy"] for task in tasks):
        _line(axis, [_share(before, task) for task in tasks], BEFORE, **BEFORE_LINE)
    axis.set_xticks(range(len(tasks) + 1), [*tasks, "average"], rotation=25, ha="right", rotation_mode="anchor")
    axis.axvline(len(tasks) - 0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)


def _share(run: dict[str, Any], task: str) -> float:
    return counted(task, run["accuracy"][task])["accuracy"]


def plot_differences(found: list[dict[str, Any]], path: Path) -> None:
    """Differences to one method, `found` as of `differences`, with their intervals: of accuracy, of held-out loss."""
    figure = Figure(figsize=(9.5, 1.3 + 0.45 * len(found)), layout="constrained")
    panels = (
        ("accuracy", 100, "accuracy, points (to the right: better)"),
        ("loss", 1, "held-out loss, nats (to the left: better)"),
    )
    for axis, (key, factor, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for place, entry in enumerate(found):
            if entry[key] is None or entry[key]["interval"] is None:
                continue
            colour, marker = STYLES[entry["method"]]
            axis.plot([factor * end for end in entry[key]["interval"]], [place, place], color=colour, linewidth=2)
            axis.plot(factor * entry[key]["difference"], place, color=colour, marker=marker, markersize=8)
        axis.axvline(0, color="0.4", linewidth=1)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(range(len(found)), [entry["method"] for entry in found])
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"difference to {found[0]['minus']}, with 95% intervals", fontsize=11)
    figure.savefig(path, dpi=150)


def _line(axis: Axes, shares: list[float], label: str, **style: Any) -> None:
    """A line across the bars of each task, and of the average."""
    for place, height in enumerate([*shares, statistics.mean(shares)]):
        heights = [100 * height] * 2
        axis.plot([place - 0.45, place + 0.45], heights, label=label if place == 0 else None, **style)
