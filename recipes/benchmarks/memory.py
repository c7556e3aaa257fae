"""Bytes of optimizer state, and the peak that a step allocates beyond weights, gradients and state.

    python -m recipes.benchmarks.memory [--size 60m] [--layers N] [--dtype float32] [--rank R] [--output FILE]

Counted, not sampled: every tensor in the state, and every allocation during one ordinary step. Writes JSON with
--output.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from recipes import errors, measure
from recipes.benchmarks.models import SIZES, matrices
from recipes.benchmarks.optimizers import BUILDERS, build
from recipes.benchmarks.options import parser as command_line
from recipes.benchmarks.options import write


def allocations(function: Callable[[], Any]) -> list[int]:
    """Sizes in bytes, in order, of what the CPU allocator gives (+) and takes back (-) while the function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    """Most bytes held at one time, beyond what was held before."""
    return max(itertools.accumulate(sizes, initial=0))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes allocated at one time by the function, beyond what was allocated before."""
    if not torch.cuda.is_available():
        return peak(allocations(function))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """name -> bytes of the state, the peak beyond it, and the peak in low-rank gradients of the largest weight."""
    size = SIZES[options.size]
    rank = options.rank or size.rank
    found: dict[str, dict[str, Any]] = {}
    for name in tqdm(options.methods, disable=None, leave=False):
        weights = matrices(size, options.layers, getattr(torch, options.dtype), options.device)
        try:
            optimizer = build(name, weights, 1e-3, rank, 10**6)
            optimizer.step()
            optimizer.step()
        except Exception as error:
            found[name] = {"error": errors.named(error)}
            continue
        peak = peak_bytes(optimizer.step)
        low_rank = max(4 * max(p.shape) * min(rank, *p.shape) for p in weights)
        found[name] = {
            "state_bytes": measure.state_bytes(optimizer),
            "peak_bytes": peak,
            "peak_low_rank_gradients": peak / low_rank,
            "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
        }
    return found


def main(words: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    parser = command_line(__doc__)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[n for n in BUILDERS if n != "muon"])
    options = parser.parse_args(words)
    for name in options.methods:
        if name not in BUILDERS:
            parser.error(f"there is no optimizer {name!r}; there are {', '.join(BUILDERS)}")
    found = run(options)
    table = Table("bytes", "state", "peak of a step beyond it", "in low-rank gradients")
    for name, row in found.items():
        if "error" in row:
            table.add_row(name, row["error"])
        else:
            peak = row["peak_low_rank_gradients"]
            table.add_row(name, f"{row['state_bytes']:,}", f"{row['peak_bytes']:,}", f"{peak:.2f}")
    Console().print(table)
    write("memory", words, options, bytes=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
