"""Time of one optimizer step on the matrices of a LLaMA: ordinary, at a refresh of the bases, and on average.

    python -m recipes.benchmarks.step [--size 60m] [--layers N] [--dtype float32] [--rank R] [--output FILE]

All optimizers run side by side in one process, turn by turn, each on weights and gradients of its own; the figures are
medians. Ratios are to torch's fused AdamW and to the floor: the two products of rank r and one pass over gradient and
weight, which is the least that a step can do. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fira_hf import PRESETS, FiraConfig
from fira_hf.views import tall
from recipes import errors
from recipes.benchmarks.models import SIZES, matrices
from recipes.benchmarks.optimizers import BUILDERS, build
from recipes.benchmarks.options import parser as command_line
from recipes.benchmarks.options import write

FLOOR = "floor"
# What is compared: a name in the table -> optimizer and settings of its group. By default fira_hf spreads its
# refreshes over an interval of its own; the others refresh all bases at one step.
DEFAULT = "fira_hf"
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    DEFAULT: ("fira_hf", {}),
    "fira_hf, together": ("fira_hf", {"refresh": "together"}),
    "fira_hf, published": ("fira_hf", {"projection": "svd", "refresh": "together", "moments": "kept"}),
    "fira_hf, adafactor": ("fira_hf", {"refresh": "together", "base_optimizer": "adafactor"}),
    "fira_hf, lion": ("fira_hf", {"refresh": "together", "base_optimizer": "lion"}),
    "fira_hf, subspace-muon": ("fira_hf", {"refresh": "together", **PRESETS["subspace-muon"]}),
    "fira_hf, muon-4bit": ("fira_hf", {"refresh": "together", **PRESETS["muon-4bit"]}),
} | {name: (name, {}) for name in BUILDERS if name != "fira_hf"}


def floor(weights: list[nn.Parameter], rank: int) -> Callable[[], None]:
    """The two products and one pass, on buffers that are there already."""
    work = []
    for p in weights:
        W, G = tall(p.detach()), tall(p.grad)
        Q = torch.linalg.qr(torch.randn(G.shape[1], min(rank, G.shape[1]), device=p.device)).Q.to(p.dtype).contiguous()
        work.append((W, G, Q, torch.empty(len(G), Q.shape[1], dtype=p.dtype, device=p.device)))

    def run() -> None:
        for W, G, Q, R in work:
            torch.mm(G, Q, out=R)
            W.addmm_(R, Q.t(), alpha=-1e-6).add_(G, alpha=-1e-6)

    return run


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, the device included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """name -> milliseconds: of the first step, the median ordinary one, a refresh, on average, and the longest."""
    size = SIZES[options.size]
    rank = options.rank or size.rank

    def fresh() -> list[nn.Parameter]:
        return matrices(size, options.layers, getattr(torch, options.dtype), options.device)

    steps: dict[str, Callable[[], Any]] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        if name == FLOOR:
            steps[name] = floor(fresh(), rank)
            continue
        kind, settings = CHOICES[name]
        try:
            gap = FiraConfig().update_proj_gap if name == DEFAULT else options.steps
            steps[name] = build(kind, fresh(), 1e-3, gap=gap, **{"rank": rank, **settings}).step
        except ImportError as error:
            failed[name] = {"error": errors.text(error)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    # Refreshes fall on step 0, and once more in the middle; the steps between are ordinary.
    for _ in tqdm(range(2 * options.steps), disable=None, leave=False):
        for name, step in list(steps.items()):
            try:
                times[name].append(1000 * timed(step))
            except Exception as error:
                failed[name] = {"error": errors.named(error)}
                del steps[name], times[name]
    found: dict[str, dict[str, Any]] = {}
    for name, ms in times.items():
        ordinary = statistics.median(t for i, t in enumerate(ms) if i % options.steps)
        found[name] = {"first": ms[0], "ordinary": ordinary, "longest": max(ms), "all": ms}
        if name == DEFAULT:
            found[name]["amortised"] = statistics.mean(ms[1:])
        elif name != FLOOR:
            refresh = ms[options.steps]
            found[name] |= {"refresh": refresh, "amortised": ordinary + (refresh - ordinary) / options.gap}
    return found | failed


def print_table(found: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="milliseconds; ratios of the ordinary step", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for title in ("ordinary", "/AdamW", "/floor", "refresh", "average", "first", "longest"):
        table.add_column(title, justify="right")
    for name, row in found.items():
        if "error" in row:
            table.add_row(name, row["error"])
            continue

        def ratio(other: str, row: dict[str, Any] = row) -> str:
            base = found.get(other, {}).get("ordinary")
            return f"{row['ordinary'] / base:.2f}" if base else "-"

        cells = (f"{row[key]:.1f}" if key in row else "-" for key in ("refresh", "amortised", "first", "longest"))
        table.add_row(name, f"{row['ordinary']:.1f}", ratio("adamw"), ratio(FLOOR), *cells)
    Console().print(table)


def main(words: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--gap", type=int, default=200, help="refresh interval of the average (default: 200)")
    parser.add_argument("--steps", type=int, default=12, help="ordinary steps before and after the refresh")
    parser.add_argument("--methods", type=lambda text: text.split(";"), default=[FLOOR, *CHOICES], help='"a;b;c"')
    options = parser.parse_args(words)
    for name in options.methods:
        if name not in (FLOOR, *CHOICES):
            parser.error(f"there is no method {name!r}; there are {'; '.join((FLOOR, *CHOICES))}")
    if options.threads:
        torch.set_num_threads(options.threads)
    found = run(options)
    print_table(found)
    write("step", words, options, milliseconds=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
