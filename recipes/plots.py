"""What the pictures of the reports share: a colour and a marker for each method, and the curves of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recipes.settings import BEFORE

# Okabe and Ito's colours, which colour-blind readers tell apart; a method has the same one in every picture.
STYLES = {  # colour and marker
    "lora": ("#0072B2", "o"),
    "dora": ("#003F69", "v"),
    "lora-two-rates": ("#003F69", "v"),
    "relora": ("#56B4E9", "P"),
    "lora-equal-bytes": ("#7A9CC6", "s"),
    "adamw": ("#009E73", "^"),
    "adamw-full": ("#009E73", "^"),
    "adamw-two-rates": ("#004D37", "v"),
    "fira": ("#D55E00", "D"),
    "fira-full": ("#D55E00", "D"),
    "fira-int8-full": ("#F4A582", "P"),
    "fira-published-full": ("#8A3B00", "d"),
    "subspace-muon-full": ("#6A3D9A", "*"),
    "subspace-muon": ("#6A3D9A", "*"),
    "muon-full": ("#B39DD6", "p"),
    "muon": ("#B39DD6", "p"),
    "fira-on-lora": ("#E69F00", "s"),
    "fira-hf": ("#E69F00", "s"),
    "qlora": ("#0072B2", "X"),
    "fira-on-qlora": ("#E69F00", "X"),
    "galore": ("#CC79A7", "v"),
    "galore-full": ("#CC79A7", "v"),
    "galore-on-lora": ("#E8BCD6", "o"),
    "flora": ("#777777", "X"),
    "flora-full": ("#777777", "X"),
    "flora-on-lora": ("#BBBBBB", "o"),
    "apollo": ("#000000", "s"),
}
BEFORE_LINE = {"color": "#A00000", "linewidth": 2.5, "linestyle": ":"}


def plot_losses(
    runs: list[dict[str, Any]],
    path: Path,
    panels: list[tuple[str, str, str, str]],
    before: dict[str, Any] | None = None,
) -> None:
    """Curves by optimizer step; one line a run, one colour a method.

    panels: for each the figure in the history of a run, the title, the label and the scale of its axis; before: the
    figures before training, of which those that a panel shows get a line.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    others = [method for method in dict.fromkeys(run["method"] for run in runs) if method not in STYLES]
    for axis, (key, title, label, scale) in zip(axes, panels, strict=True):
        for run in runs:
            points = [(entry["step"], entry[key]) for entry in run["history"] if key in entry]
            if not points:
                continue
            method = run["method"]
            name = method if method not in axis.get_legend_handles_labels()[1] else None
            colour, marker = STYLES.get(method) or (f"C{others.index(method)}", "o")
            line = "--" if method in others[10:] else "-"  # there are ten colours
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3.5}
            axis.plot(*zip(*points, strict=True), label=name, **style)
        if before is not None and before.get(key) is not None:
            axis.axhline(before[key], label=BEFORE, **BEFORE_LINE)
        axis.set(title=title, xlabel="optimizer step", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[1]))
    if labels:
        figure.legend(handles, labels, frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)
