"""Finding the basis: time beside torch.linalg.svd, and captured energy beside the exact basis.

    python -m recipes.benchmarks.basis time [--shapes 2048x5461x512,...] [--output FILE]
    python -m recipes.benchmarks.basis energy [--data DIR] [--size 1m] [--projection power] [--output FILE]

`time` refreshes a warm basis. `energy` trains a model of the quality benchmark and looks at every refresh of every
matrix at the gradient of that step: ||G Q||^2 of the basis in use over that of the exact one, at the refresh and just
before it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from fira_hf.subspace import find_bases
from fira_hf.views import tall
from recipes.benchmarks.models import gradient
from recipes.benchmarks.options import write
from recipes.benchmarks.quality.train import Data, Regime, load, train
from recipes.pretraining.settings import EMBEDDED


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare_times(shapes: list[tuple[int, int, int]], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for long, short, rank in shapes:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.zeros(long, short))
        G = gradient(weight, generator)
        (Q,) = find_bases([G], rank, "power", [None], [0])
        G = gradient(weight, generator).lerp_(G, 0.5)  # another gradient than the one that the basis is of
        power = median_seconds(lambda G=G, Q=Q, rank=rank: find_bases([G], rank, "power", [Q], [1]), 5)
        svd = median_seconds(lambda G=G: torch.linalg.svd(G, full_matrices=False), repeats)
        rows.append({"long": long, "short": short, "rank": rank, "power": power, "svd": svd, "ratio": svd / power})
    return rows


def captured_energy(G: Tensor, Q: Tensor) -> float:
    """||G Q||^2 over that of the exact basis of the same rank, in fp64."""
    G, Q = tall(G).double(), Q.double()
    exact = torch.linalg.eigvalsh(G.T @ G)[-Q.shape[1] :].sum()
    return float((G @ Q).square().sum() / exact)


def watch_energy(projection: str, gap: int, lr: float, regime: Regime, data: Data) -> list[dict[str, Any]]:
    """Rows of step, matrix, and the captured energy before and after the refresh of all bases."""
    settings = {"projection": projection, "refresh": "together", "moments": "kept"}
    method = {"optimizer": "fira_hf", "interval": gap, "settings": settings}
    rows: list[dict[str, Any]] = []
    before: dict[int, Tensor] = {}

    def watch(step: int, optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter]) -> None:
        for index, p in enumerate(matrices):
            Q = optimizer.state[p]["basis"]
            if step % gap == 0:
                row = {"step": step, "matrix": index, "after": captured_energy(p.grad, Q)}
                if step:
                    row["before"] = captured_energy(p.grad, before[index])
                rows.append(row)
            if step % gap == gap - 1:
                before[index] = Q.clone()

    with tqdm(total=regime.steps, disable=None, leave=False) as bar:
        train(method, lr, regime, 0, data, watch, lambda step, loss: bar.update())
    return rows


def _shapes(text: str) -> list[tuple[int, int, int]]:
    found = []
    for shape in text.split(","):
        rows, columns, rank = map(int, shape.split("x"))
        found.append((max(rows, columns), min(rows, columns), rank))
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("time")
    one.add_argument("--shapes", type=_shapes, default=_shapes("512x512x128,2048x5461x512,4096x11008x128"))
    one.add_argument("--repeats", type=int, default=1, help="of the SVD, which takes long")
    two = commands.add_parser("energy")
    two.add_argument("--data", default=EMBEDDED, help="folder with train.txt and valid.txt; default: Python's manual")
    two.add_argument("--size", default="1m", help="tiny, 1m, 3m or 10m")
    two.add_argument("--batch", type=int, default=4096, help="bytes of a step")
    two.add_argument("--steps", type=int, default=250)
    two.add_argument("--interval", type=int, default=50)
    two.add_argument("--projection", default="power")
    two.add_argument("--lr", type=float, default=3e-3)
    for command in (one, two):
        command.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    if options.what == "time":
        rows = compare_times(options.shapes, options.repeats)
        table = Table("long x short, rank", "power (ms)", "svd (ms)", "ratio")
        for row in rows:
            shape = f"{row['long']} x {row['short']}, {row['rank']}"
            table.add_row(shape, f"{1000 * row['power']:.1f}", f"{1000 * row['svd']:.1f}", f"{row['ratio']:.0f}")
    else:
        regime = Regime(options.size, options.batch, options.steps)
        rows = watch_energy(options.projection, options.interval, options.lr, regime, load(options.data))
        table = Table("step", "before the refresh (mean)", "after (mean)", "after (lowest)")
        for step in dict.fromkeys(row["step"] for row in rows):
            here = [row for row in rows if row["step"] == step]
            before = f"{statistics.mean(row['before'] for row in here):.4f}" if step else "-"
            after = [row["after"] for row in here]
            table.add_row(str(step), before, f"{statistics.mean(after):.4f}", f"{min(after):.4f}")
    Console().print(table)
    write("basis", words, options, what=options.what, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
