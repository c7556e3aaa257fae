"""How long each kernel takes with other block sizes, warps and stages than those it is launched with.

A kernel is replaced by one that launches it with these settings and the grid that goes with them. What is set first is
timed first, then what differs from it in one setting, in two, and so on, until the time has passed: most of it goes
into compiling. Tensors are larger than the caches, and nobody's: a kernel that writes in place may do so many times.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipes import errors
from recipes.benchmarks.kernels import BETAS, EPS


@dataclass(frozen=True)
class Tuned:
    """A function, its kernel, which size is divided by which block for each axis of the grid but the last, and the
    values to try."""

    function: str
    kernel: str
    axes: tuple[tuple[str, str], ...]
    values: dict[str, tuple[int, ...]]


WARPS, STAGES = (4, 8), (2, 3, 4)
KERNELS = (
    Tuned(
        "project",
        "_project_kernel",
        (("rank", "BLOCK_R"), ("long", "BLOCK_L")),
        {"BLOCK_L": (64, 128), "BLOCK_S": (32, 64, 128), "num_warps": WARPS, "num_stages": STAGES},
    ),
    Tuned(
        "apply_updates",
        "_update_kernel",
        (("short", "BLOCK_S"), ("long", "BLOCK_L")),
        {
            "BLOCK_L": (64, 128),
            "BLOCK_S": (64, 128, 32),
            "BLOCK_R": (32, 64, 128),
            "num_warps": WARPS,
            "num_stages": STAGES,
        },
    ),
    Tuned(
        "direction",
        "_direction_kernel",
        (("long", "BLOCK_L"),),
        {"BLOCK_L": (4, 8, 16, 32, 64), "num_warps": (2, 4, 8)},
    ),
)
# long, short, rank and number of the matrices: the MLP's of 7B and of 1B
SHAPES = {"7b": (11008, 4096, 128, 6), "1b": (5461, 2048, 256, 24)}
TINY = {"tiny": (48, 32, 16, 2)}


class Launcher:
    """In place of a kernel: the same launches with other settings, which are then in `used`."""

    def __init__(self, kernel: Any, axes: tuple[tuple[str, str], ...]) -> None:
        self.kernel, self.axes = kernel, axes
        self.settings: dict[str, int] = {}
        self.used: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **keywords: Any) -> Any:
            self.used = keywords | self.settings
            sizes = dict(zip(self.kernel.arg_names, args, strict=False))
            blocks = (-(-sizes[size] // self.used[block]) for size, block in self.axes)
            return self.kernel[(*blocks, grid[-1])](*args, **self.used)

        return launch


def call(kernels: Any, function: str, shape: tuple[int, int, int, int], wide: bool, device: str) -> Callable[[], Any]:
    """A call of the function on bf16 matrices of the shape, wide ones as their tall views."""
    long, short, rank, count = shape

    def matrices() -> list[torch.Tensor]:
        sides = (short, long) if wide else (long, short)
        made = [(0.02 * torch.randn(sides, device=device)).bfloat16() for _ in range(count)]
        return [one.t() for one in made] if wide else made

    def low_rank() -> torch.Tensor:
        return torch.randn(count, long, rank, device=device)

    active = torch.ones(count, dtype=torch.bool, device=device)
    if function == "direction":
        R, moments = low_rank(), [list(low_rank()), list(low_rank().square())]
        return lambda: kernels.direction("adamw", R, moments, BETAS, EPS, active)
    weights, grads = matrices(), matrices()
    bases = [torch.randn(rank, short, device=device).t() for _ in range(count)]
    if function == "project":
        return lambda: kernels.project(grads, bases)
    N, R, a, B = low_rank(), low_rank(), torch.full((count, 1, 1), 1e-6, device=device), 1e-6 * low_rank()[..., :1]
    return lambda: kernels.apply_updates(weights, grads, N, R, a, 0.25, B, bases, 1.0, active)


def milliseconds(function: Callable[[], Any], device: str, calls: int = 10) -> float:
    """Of one call: the median of five rounds, each on the device's clock."""
    function()  # compiles
    times = []
    for _ in range(5):
        if device == "cpu":
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def run(kernels: Any, one: Tuned, shape: tuple[int, int, int, int], wide: bool, device: str, seconds: float) -> dict:
    """Settings and milliseconds as set now, and of all that were tried, the fastest first."""
    end = time.perf_counter() + seconds
    original = getattr(kernels, one.kernel)
    launcher = Launcher(original, one.axes)
    setattr(kernels, one.kernel, launcher)
    try:
        function = call(kernels, one.function, shape, wide, device)
        now = milliseconds(function, device)
        # what a launch does not name is Triton's default
        set_now = {name: launcher.used.get(name, {"num_warps": 4, "num_stages": 3}.get(name)) for name in one.values}
        every = [dict(zip(one.values, values, strict=True)) for values in itertools.product(*one.values.values())]
        every.sort(key=lambda settings: sum(settings[name] != set_now[name] for name in settings))
        rows: list[dict[str, Any]] = []
        for settings in every:
            if rows and time.perf_counter() > end:
                break
            launcher.settings = settings
            try:
                rows.append({"settings": settings, "milliseconds": milliseconds(function, device)})
            except Exception as error:  # too much shared memory, most of all
                rows.append({"settings": settings, "error": errors.named(error)})
    finally:
        setattr(kernels, one.kernel, original)
    rows.sort(key=lambda row: row.get("milliseconds", float("inf")))
    return {"set_now": set_now, "milliseconds": now, "tried": rows, "left_out": len(every) - len(rows)}
