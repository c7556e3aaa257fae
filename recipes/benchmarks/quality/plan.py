"""Which runs are wanted, judged by those that are there: what they were made of, and rates searched until bracketed.

A run is a JSON file, named by method, regime, rate and seed. Nothing here trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes import files
from recipes.benchmarks.optimizers import BUILDERS, QUALITY
from recipes.benchmarks.quality.train import Data, Regime

AROUND, ADAMW = "around", "adamw"  # of --rates, beside numbers
LOWEST, HIGHEST = -16, 2  # of the grid: 1e-8 to 10
METHODS = Path(__file__).with_name("methods.yaml")
KEYS = {"label", "optimizer", "rate", "settings", "share", "rank", "interval", "lora", "weights"}
STORED = ("bfloat16", "int8")  # how matrices can be kept, beside fp32

Losses = dict[float, float]  # by rate; infinite where the run diverged


def at(index: int) -> float:
    """The grid of rates: ..., 1e-3 at -6, 3e-3 at -5, 1e-2 at -4, ..."""
    return float(f"{(1, 3)[index % 2]}e{index // 2}")


GRID = {at(index): index for index in range(LOWEST, HIGHEST + 1)}


def read_methods(path: Path = METHODS) -> dict[str, dict[str, Any]]:
    """name -> what it is, from a YAML file; its first rate is on the grid."""
    methods = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, method in methods.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{path}: {name!r} names files, so write it in letters, digits, dots and hyphens.")
        unknown = set(method) - KEYS
        if unknown:
            raise ValueError(
                f"{path}, {name}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(KEYS))}."
            )
        if method.get("optimizer") not in BUILDERS | QUALITY:
            known = ", ".join(BUILDERS | QUALITY)
            raise ValueError(f"{path}, {name}: optimizer is {method.get('optimizer')!r}; there are {known}.")
        if method.get("weights", STORED[0]) not in STORED:
            raise ValueError(f"{path}, {name}: weights is {method['weights']!r}; write {' or '.join(STORED)}.")
        try:
            method["rate"] = float(method.get("rate"))  # YAML takes 1e-3 for a word
        except (TypeError, ValueError):
            method["rate"] = None
        if method["rate"] not in GRID:
            raise ValueError(f"{path}, {name}: its rate must be 1 or 3 times a power of ten, from 1e-8 to 10.")
        method.setdefault("label", name)
    return methods


def best(losses: Losses) -> float:
    """The rate of the lowest loss; of equal ones the lowest rate."""
    return min(sorted(losses), key=losses.__getitem__)


def missing_rates(losses: Losses, first: float) -> list[float]:
    """The rates that are wanted next: the first one, then neighbours of the best until both are there.

    Empty once a lower and a higher rate are there that are no better than the best, a third and three times of it; or
    where the grid ends.
    """
    on_grid = {rate: loss for rate, loss in losses.items() if rate in GRID}
    if first not in on_grid:
        return [first]
    index = GRID[best(on_grid)]
    if math.isinf(on_grid[at(index)]):  # all have diverged, and higher ones will
        neighbours = [index - 1]
    else:
        neighbours = [index - 1, index + 1]
    return [at(one) for one in neighbours if LOWEST <= one <= HIGHEST and at(one) not in on_grid]


@dataclass(frozen=True)
class Run:
    """A method at a rate and a seed in a regime."""

    method: str
    regime: Regime
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return name_of(self.method, self.regime, self.lr, self.seed)


def name_of(method: str, regime: Regime, lr: float, seed: int) -> str:
    return f"{method}-{regime}-lr{lr:g}-seed{seed}"


@dataclass
class Folder:
    """The results of runs, all on one text."""

    path: Path
    data: Data
    methods: dict[str, dict[str, Any]]

    def result(self, run: Run) -> dict[str, Any] | None:
        """None if it is not there.

        Raises ValueError if it was made of other settings or on another text.
        """
        path = self.path / f"{run.name}.json"
        found = files.read_json(path)
        if found is None:
            return None
        if found["data"]["digest"] != self.data.digest:
            raise ValueError(
                f"{path} is of the text {found['data']['name']}, not of {self.data.name}; choose another --output_dir."
            )
        if made_of(found["settings"]) != made_of(self.methods[run.method]):
            raise ValueError(
                f"{path} was made with {made_of(found['settings'])}, but {run.method} is now "
                f"{made_of(self.methods[run.method])}; give the method another name, or delete its runs."
            )
        return found

    def losses(self, method: str, regime: Regime, seed: int) -> Losses:
        """Of the runs that are there, by rate."""
        prefix, suffix = f"{method}-{regime}-lr", f"-seed{seed}.json"
        found: Losses = {}
        for path in self.path.glob(f"{prefix}*{suffix}"):
            lr = float(path.name.removeprefix(prefix).removesuffix(suffix))
            result = self.result(Run(method, regime, lr, seed))
            if result is not None:
                found[lr] = math.inf if result["loss"] is None else result["loss"]
        return found


def made_of(method: dict[str, Any]) -> dict[str, Any]:
    """What decides the outcome: neither what it is called nor where its search began."""
    return {key: value for key, value in method.items() if key not in ("label", "rate")}


@dataclass
class Plan:
    """What one command wants: every method with these rates and seeds in one regime.

    rates: numbers, and "around" (the best rate of the first seed in `searched`, a regime that was searched before, and
        its neighbours) or "adamw" (the rate that is best for the method adamw in this regime).
    search: begin at the method's own first rate and go on until the best is bracketed.
    """

    folder: Folder
    methods: list[str]
    regime: Regime
    seeds: list[int]
    search: bool = False
    rates: list[float | str] = field(default_factory=list)
    searched: Regime | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in self.folder.methods:
                raise ValueError(f"There is no method {name!r}; there are {', '.join(self.folder.methods)}.")
        if not self.search and not self.rates:
            raise ValueError("No rates are given: --search looks for the best ones, --rates 1e-3,3e-3 names them.")
        if AROUND in self.rates and self.search:
            raise ValueError("--search and --rates around exclude each other: both look for the best rate.")
        if AROUND in self.rates and self.searched == self.regime:
            raise ValueError(f"--rates around wants another regime than {self.searched}, which it starts from.")
        for name in self.methods if AROUND in self.rates else []:
            self._searched_best(name, self.searched)
        if ADAMW in self.rates:
            self._searched_best(ADAMW, self.regime)

    def _searched_best(self, method: str, regime: Regime) -> float:
        found = self.folder.losses(method, regime, self.seeds[0]) if method in self.folder.methods else {}
        found = {rate: loss for rate, loss in found.items() if rate in GRID}
        if not found:
            raise ValueError(
                f"{self.folder.path} has no run of {method} in {regime} with seed {self.seeds[0]}; search there: "
                f"--search --methods {method} --size {regime.size} --batch {regime.batch} --steps {regime.steps}"
            )
        return best(found)

    def wanted(self) -> list[Run]:
        """The runs that are wanted now and not there, the first rates of all methods before the second ones.

        More may be wanted when these are done; an empty list says that all is done.
        """
        found: list[tuple[int, int, Run]] = []
        for order, method in enumerate(self.methods):
            losses = self.folder.losses(method, self.regime, self.seeds[0])
            missing = self._missing_of_search(method, losses)
            first = [Run(method, self.regime, lr, self.seeds[0]) for lr in missing]
            fixed = [one for one in self.rates if isinstance(one, float)]
            fixed += [self._searched_best(ADAMW, self.regime)] if ADAMW in self.rates else []
            others = [Run(method, self.regime, lr, seed) for seed in self.seeds for lr in fixed]
            if (self.search or AROUND in self.rates) and not missing:
                others += [Run(method, self.regime, best(losses), seed) for seed in self.seeds[1:]]
            for run in unique(others):
                if run not in first and self.folder.result(run) is None:
                    first.append(run)
            done = len(losses)
            found += [(done + number, order, run) for number, run in enumerate(first)]
        return [run for _, _, run in sorted(found, key=lambda one: one[:2])]

    def _missing_of_search(self, method: str, losses: Losses) -> list[float]:
        if self.search:
            return missing_rates(losses, self.folder.methods[method]["rate"])
        if AROUND in self.rates:
            return missing_rates(losses, self._searched_best(method, self.searched))
        return []


def unique(runs: Iterable[Run]) -> list[Run]:
    return list(dict.fromkeys(runs))
