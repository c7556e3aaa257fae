"""What kernels are judged on, and how: the inputs of a case, and by what outputs are off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fira_hf import functional, whole

# A product may err by a sixteenth of what one rounding to a 16-bit dtype does; one of fp32 by 64 roundings.
PRODUCT = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: 2.0**-18}
# The update of a bf16 weight is one product of factors that are rounded to bf16, by up to 2^-8 each, as the gradient
# that they come from has been.
OF_UPDATE = PRODUCT | {torch.bfloat16: 2.0**-7 + 2.0**-12}
FP32 = 2.0**-20  # of what is computed in fp32, element by element
NORM = 2.0**-18  # of a norm, relative
SCALE = 2.0**-16  # of what is made of several norms, relative
BETA2_ROUNDED = 2.0**-25  # of 1 - b2 where b2 is rounded to fp32 first; its share of V is as much of g^2
BETAS, EPS = (0.9, 0.999), 1e-6
COUNT, OFF = 3, 1  # matrices of a call, and which is not active
STANDARD_ERRORS = 5  # by which a mean may be off: one of a million is further
LAYOUTS = ("tall", "wide", "strided", "stack", "fused")


@dataclass(frozen=True)
class Case:
    """One shape (long, short) of matrices: the dtypes of weights and of the state, and how they lie in memory."""

    dtype: torch.dtype
    shape: tuple[int, int]
    rank: int
    layout: str
    state: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = (f"{str(self.dtype)[6:]} {self.shape[0]}x{self.shape[1]}", f"rank {self.rank}", self.layout)
        return ", ".join(words + (() if self.state == torch.float32 else (f"state {str(self.state)[6:]}",)))


class Inputs:
    """The tensors of one case, the same each time that they are made."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.active = torch.tensor([i != OFF for i in range(COUNT)], device=device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def matrices(self, scale: float) -> list[Tensor]:
        """As tall views; strided, every second column of larger ones."""
        (long, short), layout = self.case.shape, self.case.layout

        def make(*shape: int) -> Tensor:
            return (scale * self.random(*shape)).to(self.case.dtype)

        if layout == "wide":
            return [make(short, long).t() for _ in range(COUNT)]
        if layout == "strided":
            return [make(long, 2 * short)[:, ::2] for _ in range(COUNT)]
        if layout == "stack":
            return list(make(COUNT, long, short).unbind())
        if layout == "fused":
            return [part.t() for part in make(COUNT * short, long).chunk(COUNT)]
        return [make(long, short) for _ in range(COUNT)]

    def gradients(self) -> list[Tensor]:
        grads = self.matrices(0.02)
        grads[OFF].fill_(torch.nan)[::2] = torch.inf
        return grads

    def bases(self) -> list[Tensor]:
        short, rank = self.case.shape[1], self.case.rank
        return [
            functional.column_major(torch.linalg.qr(self.random(short, rank)).Q).to(self.case.state) for _ in "123"
        ]

    def ranges(self) -> list[Any]:
        """Of neighbouring columns, the first and the last of which lie partly outside, as in a sharded weight."""
        short, rank = self.case.shape[1], self.case.rank
        return [range(first, first + rank) for first in (-(rank // 2), 0, short - (rank + 1) // 2)]

    def moments(self, is_packed: bool) -> list[whole.Whole]:
        """Of the weights' size, as they are kept beside such weights: of the state's dtype, or in codes of 8 bits for
        fp32 and 4 for bf16. Strided, parts of something wider."""
        (long, short), layout = self.case.shape, self.case.layout
        is_turned = layout in ("wide", "fused")
        rows, columns = (short, long) if is_turned else (long, short)
        values = 0.02 * self.random(COUNT, rows, columns)
        bits = 8 if self.case.state == torch.float32 else 4
        kept = whole.encode(values, bits) if is_packed else (values.to(self.case.state),)
        if layout == "strided":
            kept = tuple(torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in kept)
        each = zip(*kept, strict=True)
        return [whole.Whole(of[0], of[1] if is_packed else None, columns, is_turned) for of in each]

    def low_rank(self, rows: int) -> Tensor:
        return self.random(COUNT, rows, self.case.rank)


class Errors:
    """By what outputs are off: `error` relative to the norm, and `worst` relative to what each element may be off."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: Tensor, exact: Tensor, allowed: Tensor) -> None:
        if value.shape != exact.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(exact.shape)}")
        off = (value.double() - exact).abs()
        tiny = torch.finfo(value.dtype).tiny * torch.finfo(value.dtype).eps
        whole = exact.norm().clamp(min=1e-300)
        self.put(name, (off.norm() / whole).item(), (off / (allowed + tiny)).max().item())

    def put(self, name: str, error: float, worst: float) -> None:
        old = self.found.get(name, {"error": 0.0, "worst": 0.0})
        # a NaN is larger than anything
        new = {"error": error, "worst": worst}
        self.found[name] = {key: max(old[key], new[key] if new[key] == new[key] else torch.inf) for key in old}

    def same(self, name: str, value: Tensor, before: Tensor) -> None:
        """What must not have changed, to the last bit."""
        is_same = torch.equal(value, before)
        self.put(name, 0.0 if is_same else torch.inf, 0.0 if is_same else torch.inf)


def roundoff(dtype: torch.dtype, at_random: bool = False) -> float:
    """The relative error of one rounding; at random to either neighbour it is twice as large."""
    return torch.finfo(dtype).eps * (1.0 if at_random else 0.5)


def row_counts(case: Case) -> tuple[int, ...]:
    """Of the norms of rows: one, as many as the case has, and more than a program takes at once, which is 4096."""
    return 1, case.shape[0], 2 * 4096 + case.shape[0]


def on() -> list[int]:
    return [i for i in range(COUNT) if i != OFF]
