"""Train small byte-level LLaMAs from scratch with every method, each at its own best learning rate.

    python -m recipes.benchmarks.quality --search --output_dir runs/quality [--data DIR] [--methods adamw,muon]
        looks for each method's rate on the grid 1, 3, 10, until a lower and a higher one are no better
    python -m recipes.benchmarks.quality --rates around --size 3m --output_dir runs/quality [--seeds 0,1,2]
        the rate that was best in the search and its neighbours, in another regime
    python -m recipes.benchmarks.quality --rates adamw,3e-3 --output_dir runs/quality
        each method at the rate that is best for AdamW, and at 3e-3

Seeds beyond the first run at the best rate, and at those that --rates names. A run is a JSON file in --output_dir and
is not run again: the same command goes on where it was interrupted, and several commands can share a folder.
`python -m recipes.benchmarks.report --gather runs/quality` makes tables and pictures of them, and one JSON. Another
experiment begins with the runs of such a JSON by --known, so that a method of one's own stands beside them at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes import errors, files
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.quality.plan import ADAMW, AROUND, METHODS, Folder, Plan, read_methods
from recipes.benchmarks.quality.report import scatter
from recipes.benchmarks.quality.train import Regime, load
from recipes.benchmarks.quality.work import share
from recipes.pretraining.settings import EMBEDDED
from recipes.runner import console


def read_rate(word: str) -> float | str:
    if word in (AROUND, ADAMW):
        return word
    try:
        rate = float(word)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"--rates has {word!r}; write positive numbers, {AROUND} or {ADAMW}, separated by commas.")
    return rate


def read_seeds(text: str) -> list[int]:
    if not all(word.isdecimal() for word in text.split(",")):
        raise ValueError(f"--seeds is {text!r}; write whole numbers, separated by commas.")
    return [int(word) for word in text.split(",")]


def not_installed(methods: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Methods whose package is missing, and what says so."""
    found = {}
    for name, method in methods.items():
        weight = nn.Parameter(torch.zeros(8, 8))
        try:
            build(method["optimizer"], [weight], 1e-3, method.get("rank") or 4, 10, **method.get("settings", {}))
        except ImportError as error:
            found[name] = errors.text(error)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--search", action="store_true", help="look for the best rate of each method")
    parser.add_argument("--rates", default="", help="numbers, around, adamw")
    parser.add_argument("--methods", help="default: all whose packages are installed")
    parser.add_argument("--size", default="1m", help="tiny, 1m, 3m or 10m")
    parser.add_argument("--batch", type=int, default=4096, help="bytes of a step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0", help="the search is by the first one")
    parser.add_argument(
        "--data", default=EMBEDDED, help="folder with train.txt and valid.txt; default: Python's manual"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all workers")
    parser.add_argument("--searched", default="1m,4096,400", help="where --rates around begins: size,batch,steps")
    parser.add_argument("--known", type=Path, help="a gathered JSON: its runs are taken for done")
    parser.add_argument("--methods_file", type=Path, default=METHODS, help="what the methods are")
    options = parser.parse_args(words)
    try:
        plan = read_plan(options)
        if options.workers < 1:
            raise ValueError(f"--workers is {options.workers}; at least one has to work.")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, but torch sees no CUDA device here; leave it out.")
        plan.wanted()  # what the folder holds of other settings is an error here, before there are workers
        command = ["python", "-m", "recipes.benchmarks.quality", *(sys.argv[1:] if words is None else words)]
        return int(share(plan, options.workers, command, console, options.device) > 0)
    except (ValueError, OSError, RuntimeError) as error:
        return errors.refuse(error)


def read_plan(options: argparse.Namespace) -> Plan:
    methods = read_methods(options.methods_file)
    chosen = options.methods.split(",") if options.methods else list(methods)
    regime = Regime(options.size, options.batch, options.steps)
    size, batch, steps = (*options.searched.split(","), "", "")[:3]
    if not (batch.isdecimal() and steps.isdecimal()):
        raise ValueError(f"--searched is {options.searched!r}; write size,batch,steps as in 1m,4096,400.")
    rates = [read_rate(word) for word in options.rates.split(",") if word]
    folder = Folder(options.output_dir, load(options.data), methods)
    if options.known is not None:
        known = files.read_json(options.known)
        if not known or "regimes" not in known:
            raise ValueError(f"--known is {options.known}, which holds no gathered runs.")
        if known["data"]["digest"] != folder.data.digest:
            raise ValueError(f"--known is {options.known}, whose runs are of the text {known['data']['name']!r}.")
        scatter(known, options.output_dir)
    searched = Regime(size, int(batch), int(steps))
    plan = Plan(folder, chosen, regime, read_seeds(options.seeds), options.search, rates, searched)
    missing = not_installed({name: methods[name] for name in chosen})
    for name, reason in missing.items():
        if options.methods:
            raise ValueError(f"--methods has {name}, whose package is not installed: {reason}")
        console.print(f"{name} is left out: {reason}")
    return dataclasses.replace(plan, methods=[name for name in chosen if name not in missing])


if __name__ == "__main__":
    sys.exit(main())
