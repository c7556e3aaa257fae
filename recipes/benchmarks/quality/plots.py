"""The three pictures of the quality benchmark: loss by tokens, loss by bytes of state, and distances by regime."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.benchmarks.quality.plan import ADAMW
from recipes.benchmarks.quality.report import MUON, Outcome, outcomes, title

LINES = ("-", "--", ":", "-.")
MARKERS = "osv^Dd"
OURS = ("#D55E00", "#A50F15", "#E69F00", "#FB6A4A", "#7A0177")
THEIRS = ("C0", "C2", "C4", "C5", "C6", "C7", "C8", "C9")
NOTHING = 0.01  # bytes a weight: where methods without a state stand on a logarithmic axis
CROWDED, COLUMN = 0.3, 14  # bytes a weight: from where on names stand in a column, and where that is


def draw(content: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes NAME-tokens.png, NAME-state.png and NAME-distance.png."""
    figures = {"tokens": by_tokens, "state": by_state, "distance": by_regime}
    paths = []
    for kind, make in figures.items():
        path = folder / f"{name}-{kind}.png"
        make(content).savefig(path, dpi=120)
        paths.append(path)
    return paths


def style(content: dict[str, Any], one: Outcome) -> dict[str, Any]:
    """The same for a method in every picture; ours are thick and of the warm colours."""
    names = [name for name, about in content["methods"].items() if (about["optimizer"] == "fira_hf") == one.ours]
    index = names.index(one.name)
    colours = OURS if one.ours else THEIRS
    round_, number = divmod(index, len(colours))
    look = {"color": colours[number], "linestyle": LINES[round_ % 4], "marker": MARKERS[index % len(MARKERS)]}
    return look | {"linewidth": 2.2 if one.ours else 1.2, "markersize": 4, "zorder": 3 if one.ours else 2}


def panels(
    content: dict[str, Any], height: float, columns: int, extra: float
) -> tuple[Figure, list[tuple[Axes, dict[str, Any]]]]:
    """One for each regime, so many a row; `extra` is for what stands beside them."""
    regimes = content["regimes"]
    columns = min(columns, len(regimes))
    rows = math.ceil(len(regimes) / columns)
    figure = Figure(figsize=(5.2 * columns + extra, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(regimes) :]:
        axis.set_axis_off()
    return figure, list(zip(axes, regimes, strict=False))


def finite(content: dict[str, Any], regime: dict[str, Any]) -> list[Outcome]:
    return [one for one in outcomes(content, regime) if math.isfinite(one.loss)]


def by_tokens(content: dict[str, Any]) -> Figure:
    """Each method at its best rate, mean over seeds."""
    figure, places = panels(content, 4.6, columns=3, extra=3.0)
    seen: dict[str, Any] = {}
    for axis, regime in places:
        found = finite(content, regime)
        millions = [step * regime["batch"] / 1e6 for step in regime["evaluated"]]
        for one in found:
            (line,) = axis.plot(millions, one.curve, label=one.label, **style(content, one))
            seen.setdefault(one.label, line)
        if found and len(found[0].curve) > 3:
            # The first points are warm-up, alike for all, and would leave no room for the last.
            axis.set_ylim(min(one.loss for one in found) - 0.03, max(one.curve[1] for one in found))
        axis.set(title=title(regime), xlabel="million bytes of text", ylabel="validation loss, nats a byte")
        axis.grid(alpha=0.3)
    figure.legend(seen.values(), seen, frameon=False, loc="outside right upper", title="best first", fontsize=9)
    return figure


def by_state(content: dict[str, Any]) -> Figure:
    """Loss over bytes of state a weight; the line is the front: the lowest loss within so many bytes. What is further
    behind AdamW than AdamW is behind the best is named alone."""
    figure, places = panels(content, 5.9, columns=2, extra=2.0)
    for axis, regime in places:
        found = sorted(finite(content, regime), key=lambda one: one.bytes_a_weight)
        highest = 2 * _first_of_adamw(found) - min((one.first for one in found), default=0.0)
        beyond = [f"{one.label} {one.first:.2f}" for one in found if one.first > highest]
        found = [one for one in found if one.first <= highest]
        if beyond:
            above = f"above: {', '.join(beyond)}"
            axis.text(0.98, 0.98, above, transform=axis.transAxes, ha="right", va="top", fontsize=8)
        points = [(max(one.bytes_a_weight, NOTHING), one.first) for one in found]
        for one, (x, y) in zip(found, points, strict=True):
            spread = [[y - min(one.losses.values())], [max(one.losses.values()) - y]]
            look = {key: value for key, value in style(content, one).items() if key in ("color", "marker", "zorder")}
            axis.errorbar(x, y, spread, markersize=7 if one.ours else 5, capsize=2, linestyle="none", **look)
        front = [points[0]] if points else []
        for x, y in points[1:]:
            if y < front[-1][1]:
                front.append((x, y))
        if front:
            xs, ys = zip(*front, (0.85 * COLUMN, front[-1][1]), strict=True)
            axis.step(xs, ys, where="post", color="0.35", linewidth=1.3, zorder=1)
        axis.set(title=title(regime), xscale="log", xlim=(NOTHING / 1.3, 900), ylabel="validation loss, nats a byte")
        axis.set_xlabel("bytes of optimizer state a weight of the matrices")
        ticks = [NOTHING, 0.03, 0.1, 0.3, 1, 4, 8]
        axis.set_xticks(ticks, ["0", *(f"{tick:g}" for tick in ticks[1:])])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        label(axis, [(x, y, one.label, one.ours) for one, (x, y) in zip(found, points, strict=True)])
    return figure


def _first_of_adamw(found: list[Outcome]) -> float:
    return next((one.first for one in found if one.name == ADAMW), math.inf)


def label(axis: Axes, points: list[tuple[float, float, str, bool]]) -> None:
    """Names: beside the points on the left, where there is room, and in a column on the right for the others."""
    low, high = axis.get_ylim()
    gap = (high - low) / 25
    last = -math.inf
    for x, y, name, ours in sorted(points, key=lambda point: point[1]):
        look = {"fontsize": 8, "fontweight": "bold" if ours else "normal", "verticalalignment": "center"}
        if x < CROWDED:
            axis.annotate(name, (x * 1.3, y + gap / 2), **look)
            continue
        last = max(y, last + gap)
        arrow = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
        axis.annotate(name, (x, y), (COLUMN, last), arrowprops=arrow, **look)
    axis.set_ylim(low, max(high, last + gap))


def by_regime(content: dict[str, Any]) -> Figure:
    """How far each method is ahead of AdamW and behind Muon; the bars are the range over the seeds that both
    have.

    Of methods that ran in several regimes, if any did.
    """
    regimes = content["regimes"]
    found = [{one.name: one for one in finite(content, regime)} for regime in regimes]
    names = [name for name in content["methods"] if sum(name in here for here in found) > 1]
    names = names or list(content["methods"])
    figure = Figure(figsize=(13.5, 4.8), layout="constrained")
    sides = zip(figure.subplots(1, 2), ((ADAMW, "AdamW"), (MUON, "Muon")), strict=True)
    handles: dict[str, Any] = {}
    for axis, (base, called) in sides:
        for number, name in enumerate(names):
            aside = 0.5 * (number / max(len(names) - 1, 1) - 0.5)  # so that bars do not lie on one another
            here = [(one[name], one[base]) if name in one and base in one else None for one in found]
            ran = [both[0] for both in here if both]
            if name == base or not ran:
                continue
            nowhere = [math.nan]
            gaps = [
                [loss - both[1].losses[s] for s, loss in both[0].losses.items() if s in both[1].losses]
                if both
                else nowhere
                for both in here
            ]
            apart = [statistics.mean(gap) for gap in gaps]
            spread = [
                [mean - min(gap) for mean, gap in zip(apart, gaps, strict=True)],
                [max(gap) - mean for mean, gap in zip(apart, gaps, strict=True)],
            ]
            places = [index + aside for index in range(len(regimes))]
            look = style(content, ran[0]) | {"linestyle": "none"}  # regimes have no order
            handles[ran[0].label] = axis.errorbar(places, apart, spread, capsize=2, **look)
        axis.axhline(0, color="0.4", linewidth=1)
        axis.set_xticks(range(len(regimes)), [title(regime).replace(", ", "\n") for regime in regimes], fontsize=8)
        axis.set_xlim(-0.4, len(regimes) - 0.6)
        axis.set(title=f"beside {called}", ylabel=f"loss - {called}'s, nats a byte (below 0: better)")
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, frameon=False, loc="outside right upper", fontsize=9)
    return figure
