"""Runs -> one JSON; the tables and pictures that recipes.benchmarks.report puts into the pages are made from that."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import files, report
from recipes.benchmarks.quality.plan import ADAMW, GRID, at, best, name_of
from recipes.benchmarks.quality.train import Regime

MUON = "muon-09"  # beside AdamW, what methods are measured against
# What runs have in common: all of a folder, those of a regime, and those of a method in it.
SHARED = ("data", "sequence_length", "dense_lr")
OF_REGIME = ("size", "batch", "steps", "parameters", "tokens")
OF_METHOD = ("rank", "state_bytes", "bytes_a_weight")


def gather(folder: Path) -> dict[str, Any]:
    """All runs of a folder in one object: regime -> method -> runs, and once each what runs share.

    Raises ValueError if there are none, or if they are of different texts.
    """
    runs = [files.read_json(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise ValueError(f"{folder} holds no results.")
    about = {key: runs[0][key] for key in SHARED}
    if any({key: run[key] for key in SHARED} != about for run in runs):
        raise ValueError(f"{folder} holds runs of different texts or settings: gather them one by one.")
    origins: list[dict[str, Any]] = []
    regimes: dict[tuple[Any, ...], dict[str, Any]] = {}
    methods: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (run["parameters"], run["batch"], run["steps"], run["method"])):
        methods[run["method"]] = {"label": run["label"], **run["settings"]}
        shape = {key: run[key] for key in OF_REGIME}
        regime = regimes.setdefault(tuple(shape.values()), shape | {"evaluated": [], "methods": {}})
        steps = [point["step"] for point in run["history"]]
        regime["evaluated"] = max(regime["evaluated"], steps, key=len)
        cost = {key: run[key] for key in OF_METHOD}
        own = regime["methods"].setdefault(run["method"], cost | {"runs": []})
        own["runs"].append(
            {
                "lr": run["lr"],
                "seed": run["seed"],
                "loss": run["loss"],
                "history": [round(point["loss"], 4) for point in run["history"]],
                "seconds": round(run["seconds"]),
                "provenance": _origin_of(run, origins),
            }
        )
    return about | {"methods": methods, "regimes": list(regimes.values()), "provenance": origins}


def scatter(content: dict[str, Any], folder: Path) -> None:
    """The runs of a gathered JSON as the files that they were, but for those that are there."""
    about = {key: content[key] for key in SHARED}
    for regime in content["regimes"]:
        shape = {key: regime[key] for key in OF_REGIME}
        where = Regime(regime["size"], regime["batch"], regime["steps"])
        for name, own in regime["methods"].items():
            settings = {key: value for key, value in content["methods"][name].items() if key != "label"}
            cost = {key: own[key] for key in OF_METHOD}
            for run in own["runs"]:
                path = folder / f"{name_of(name, where, run['lr'], run['seed'])}.json"
                if path.is_file():
                    continue
                origin = content["provenance"][run["provenance"]]
                provenance = {key: value for key, value in origin.items() if key != "dates"}
                result = {"method": name, "label": content["methods"][name]["label"], "settings": settings}
                result |= about | shape | cost | {key: run[key] for key in ("lr", "seed", "loss", "seconds")}
                result["status"] = "diverged" if run["loss"] is None else "ok"
                points = zip(regime["evaluated"], run["history"], strict=False)
                result["history"] = [{"step": step, "loss": loss} for step, loss in points]
                result["provenance"] = provenance | {"seed": run["seed"], "date": origin["dates"][-1]}
                files.write_json(path, result)


def _origin_of(run: dict[str, Any], origins: list[dict[str, Any]]) -> int:
    """The index of where and by what command the run was made; a command's runs differ in date and seed alone."""
    own = {key: value for key, value in run["provenance"].items() if key not in ("seed", "date")}
    date = run["provenance"]["date"][:10]
    for index, origin in enumerate(origins):
        if {key: value for key, value in origin.items() if key != "dates"} == own:
            origin["dates"] = sorted({*origin["dates"], date})
            return index
    origins.append(own | {"dates": [date]})
    return len(origins) - 1


@dataclass
class Outcome:
    """A method in a regime. Losses are infinite where a run diverged.

    by_rate: loss by rate, of the first seed, which ran at all of them. lr: the best rate by that. losses: at the best
    rate, by seed. curve: mean of the validation losses at the best rate over training.

    Seeds share weights at the start and batches, and differ in how hard they are: methods compare by one that both
    have.
    """

    name: str
    label: str
    ours: bool
    bytes_a_weight: float
    by_rate: dict[float, float]
    lr: float
    losses: dict[int, float]
    curve: list[float]

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.losses.values())

    @property
    def first(self) -> float:
        """Of the first seed."""
        return self.by_rate[self.lr]

    def beside(self, steps: int) -> float | None:
        """The loss so many steps of the grid from the best rate: -1 a third of it, 1 three times. None: not tried."""
        return self.by_rate.get(at(GRID[self.lr] + steps)) if self.lr in GRID else None


def outcomes(content: dict[str, Any], regime: dict[str, Any]) -> list[Outcome]:
    """The best method first, by the first seed."""
    found = []
    for name, own in regime["methods"].items():
        first = min(run["seed"] for run in own["runs"])
        losses: dict[float, dict[int, float]] = defaultdict(dict)
        for run in own["runs"]:
            losses[run["lr"]][run["seed"]] = math.inf if run["loss"] is None else run["loss"]
        by_rate = {rate: of_rate[first] for rate, of_rate in losses.items() if first in of_rate}
        lr = best(by_rate)
        curves = [run["history"] for run in own["runs"] if run["lr"] == lr and run["loss"] is not None]
        about = content["methods"][name]
        found.append(
            Outcome(
                name,
                about["label"],
                about["optimizer"] == "fira_hf",
                own["bytes_a_weight"],
                by_rate,
                lr,
                losses[lr],
                [statistics.mean(values) for values in zip(*curves, strict=True)],
            )
        )
    return sorted(found, key=lambda outcome: outcome.first)


def title(regime: dict[str, Any]) -> str:
    batch = regime["batch"]
    each = f"{batch // 1024}k" if batch % 1024 == 0 else batch
    return f"{regime['parameters'] / 1e6:.2g}M, {each} bytes, {regime['steps']} steps"


def table(content: dict[str, Any]) -> str:
    """One table a regime, its name above it."""
    header = ["", "loss of seed 0", "mean of seeds", "best rate", "a third of it", "three times"]
    header += ["at AdamW's best rate", "state, bytes a weight"]
    parts = []
    for regime in content["regimes"]:
        found = outcomes(content, regime)
        adamw = next((one.lr for one in found if one.name == ADAMW), None)
        rows = [header]
        for one in found:
            several = list(one.losses.values()) if len(one.losses) > 1 else []
            spread = (
                f"{_loss(one.loss)} of {len(several)} ({min(several):.3f} to {max(several):.3f})" if several else ""
            )
            cells = [_loss(one.first), spread, f"{one.lr:g}"]
            cells += [_loss(one.beside(-1)), _loss(one.beside(1)), _loss(one.by_rate.get(adamw))]
            rows.append([one.label, *cells, f"{one.bytes_a_weight:.2f}"])
        parts += [f"**{title(regime)}** ({regime['tokens']:,} bytes in all)", "\n".join(report.markdown(rows))]
    return "\n\n".join(parts)


def _loss(value: float | None) -> str:
    """Empty where the rate was not tried."""
    if value is None:
        return ""
    return "diverged" if math.isinf(value) else f"{value:.3f}"


def origin(content: dict[str, Any]) -> str:
    """One line: commands (many only by their number, the JSON has them), hardware, versions, dates."""
    abouts = content["provenance"]
    every = list(dict.fromkeys(about["command"] for about in abouts))
    commands = ", ".join(f"`{command}`" for command in every)
    if len(every) > 3:
        commands = f"{len(every)} commands of `python -m recipes.benchmarks.quality`, which the JSON names,"
    devices = ", ".join(dict.fromkeys(about["device"] for about in abouts))
    versions = " and ".join(
        dict.fromkeys(
            f"torch {about['versions']['torch']}, transformers {about['versions']['transformers']}" for about in abouts
        )
    )
    dates = sorted({date for about in abouts for date in about["dates"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{commands} on {devices}, one thread a run, {versions}, {when}."
