"""What a step costs on a GPU, counted on any machine: launches, bytes through memory, reads by the host, products.

    python -m recipes.benchmarks.cost [--sizes 60m,1b,7b] [--dtype bfloat16] [--output docs/benchmarks/cost.json]

Of the matrices of all layers of a LLaMA, for each optimizer: an ordinary step, one that refreshes all bases, and the
average at the defaults. The counts, and the estimate of the time on a GPU that comes from them, are those of
`counting`. docs/cost.md says what is counted and what is not. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fira_hf import PRESETS, FiraConfig
from recipes.benchmarks.counting import DEVICES, LAUNCH, Cost, counting, multi_tensor_launches
from recipes.benchmarks.models import SIZES, Size, matrices, pretended
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.options import write

RANKS = {"tiny": 16, "60m": 128, "130m": 256, "350m": 256, "1b": 256, "7b": 128}
GAP = 200  # steps between two refreshes of the peers, as they publish it


def count_steps(
    name: str, size: Size, rank: int, dtype: torch.dtype, steps: int, with_kernels: bool = True, **settings: Any
) -> list[Cost]:
    """What each of the first steps of an optimizer costs on the matrices of a LLaMA."""
    gap = settings.pop("gap", GAP)
    found = []
    with counting(with_kernels) as counter:
        weights = matrices(size, None, dtype, "cpu")
        if name == "fira_hf":  # the others take one path everywhere
            weights = [pretended(p) for p in weights]
        optimizer = build(name, weights, 1e-3, rank, gap, **settings)
        for counter.steps in range(steps):
            counter.cost = Cost()
            optimizer.step()
            found.append(counter.cost)
    return found


def mean(rows: Sequence[Any], weights: Sequence[float]) -> Any:
    """Of numbers, or of rows key by key."""
    if isinstance(rows[0], dict):
        return {key: mean([row[key] for row in rows], weights) for key in rows[0]}
    return sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)


def peer(name: str, size: Size, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """A package that refreshes all bases together, every `GAP` steps."""
    _, _, ordinary, refresh = (cost.row() for cost in count_steps(name, size, rank, dtype, 4, gap=3))
    return {"ordinary": ordinary, "refresh": refresh, "average": mean([ordinary, refresh], [GAP - 1, 1])}


def ours(size: Size, rank: int, dtype: torch.dtype, with_kernels: bool, preset: str | None = None) -> dict[str, Any]:
    """`fira_hf`: an ordinary step and one that refreshes all bases, with refresh="together"; and the mean of the steps
    of an interval at the defaults, after the first step, in which every matrix gets its basis."""

    def rows(steps: int, **settings: Any) -> list[dict[str, Any]]:
        settings |= PRESETS[preset] if preset else {}
        costs = count_steps("fira_hf", size, rank, dtype, steps, with_kernels, **settings)
        return [cost.row() for cost in costs]

    _, _, ordinary, refresh = rows(4, gap=3, refresh="together")
    gap = FiraConfig().update_proj_gap
    return {"ordinary": ordinary, "refresh": refresh, "average": mean(rows(gap + 1, gap=gap)[1:], [1] * gap)}


def on_paper(numels: Sequence[int], bytes_an_element: int, launches: int, **flops: float) -> dict[str, Any]:
    row = Cost(launches, bytes_an_element * sum(numels), 0, **flops).row()
    return {"ordinary": row, "average": row}


def adamw(size: Size, rank: int, dtype: torch.dtype, moments: torch.dtype) -> dict[str, Any]:
    """Fused AdamW: the gradient is read, the weight and two moments are read and written. Moments in the dtype of the
    weights are what torch's own has."""
    numels = _numels(size)
    element = 3 * dtype.itemsize + 4 * moments.itemsize
    return on_paper(numels, element, multi_tensor_launches(numels, 4))


def floor(size: Size, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """What no step of this kind does without: the gradient twice, the weight in and out, and the two products with the
    basis on the tensor cores, once each, in one launch for all."""
    numels = _numels(size)
    unit = "tf32" if dtype == torch.float32 else "bf16"
    return on_paper(numels, 4 * dtype.itemsize, 2, **{unit: 4 * rank * sum(numels)})


def _numels(size: Size) -> list[int]:
    h, m = size.hidden, size.intermediate
    return ([h * h] * 4 + [h * m] * 3) * size.layers


METHODS: dict[str, Callable[[Size, int, torch.dtype], dict[str, Any]]] = {
    "floor": floor,
    "AdamW, fp32 moments": lambda *of: adamw(*of, torch.float32),
    "AdamW, moments as weights": lambda size, rank, dtype: adamw(size, rank, dtype, dtype),
    "fira_hf": lambda *of: ours(*of, with_kernels=True),
    "fira_hf, subspace-muon": lambda *of: ours(*of, with_kernels=True, preset="subspace-muon"),
    "fira_hf, without Triton": lambda *of: ours(*of, with_kernels=False),
    "fira": lambda *of: peer("fira", *of),
    "galore-torch": lambda *of: peer("galore-torch", *of),
    "apollo-torch": lambda *of: peer("apollo-torch", *of),
}
REFERENCE = "AdamW, fp32 moments"


def count(size_name: str, method: str, dtype: str) -> dict[str, Any]:
    """One row: the costs, or why there are none."""
    size, rank = SIZES[size_name], RANKS[size_name]
    row = {"size": size_name, "rank": rank, "method": method, "elements": sum(_numels(size))}
    try:
        return row | METHODS[method](size, rank, getattr(torch, dtype))
    except ImportError:
        return row | {"error": "not installed"}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "", "step", "launches", "bytes an element", "reads", *(f"{name}, ms" for name in DEVICES))
    for row in rows:
        if "error" in row:
            table.add_row(row["size"], row["method"], row["error"])
        for kind in ("ordinary", "refresh", "average"):
            if kind in row:
                cost = row[kind]
                cells = [f"{cost['launches']:,.0f}", f"{cost['bytes'] / row['elements']:.1f}", f"{cost['reads']:,.0f}"]
                cells += [f"{1000 * cost['seconds'][name]['step']:,.1f}" for name in DEVICES]
                table.add_row(row["size"], row["method"], kind, *cells)
    Console().print(table)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["60m", "1b", "7b"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="weights and gradients")
    parser.add_argument("--methods", type=lambda text: text.split(";"), default=list(METHODS), help="with ; between")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    for given, known in ((options.sizes, RANKS), (options.methods, METHODS)):
        for name in given:
            if name not in known:
                parser.error(f"there is no {name!r}; there are {', '.join(known)}")
    work = [(size, method) for size in options.sizes for method in options.methods]
    rows = [count(*of, options.dtype) for of in tqdm(work, disable=None, leave=False)]
    show(rows)
    devices = {name: asdict(device) for name, device in DEVICES.items()}
    write("cost", words, options, rows=rows, launch_seconds=LAUNCH, devices=devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
