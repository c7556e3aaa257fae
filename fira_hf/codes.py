"""Low-rank moments and bases in 8 bits: codes, and a scale (bf16) for each `GROUP` of them along the rank.

Groups lie within a row, so that processes that split a tensor by its rows split its codes and scales alike. A code is
a small floating-point number: with x the value, s the scale (the largest of a group, rounded up),

    z = b + (|x| / s) (2 - 2^-bits - b),    b = 2^-octaves,    b <= z < 2,

of which the exponent and the first `bits` bits after the point are kept, counted from those of b, so that x = 0 is
code 0. Far above b steps are relative, up to 2^-bits of z, and below it even; between two neighbours x is rounded at
random, so that the mean is x itself. The moments need both: N = M / sqrt(V) divides small numbers by small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .whole import GROUP, random_bits, scales_above


@dataclass(frozen=True)
class Code:
    """What the 8 bits are: with a sign (int8) or without (uint8)."""

    dtype: torch.dtype
    octaves: int
    bits: int

    @property
    def first(self) -> int:
        """Code 0 as the leading bits of an fp32."""
        return (127 - self.octaves) << self.bits

    @property
    def last(self) -> int:
        return ((self.octaves + 1) << self.bits) - 1

    @property
    def span(self) -> float:
        """Of z, from code 0 to the last one."""
        return 2 - 2.0**-self.bits - 2.0**-self.octaves


# Entries of a basis are of one size, so steps are even: 1/127 of the largest of a group. Of a first moment they grow
# from 1/3968 to 1/31 of it, of a second one, whose root is taken, from a millionth to 1/31.
BASIS = Code(torch.int8, octaves=0, bits=7)
FIRST = Code(torch.int8, octaves=7, bits=4)
SECOND = Code(torch.uint8, octaves=15, bits=4)
CODES = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "basis": BASIS}  # by their names in a state
SCALE = "_scale"  # what the name of their scales ends with
# A basis in bf16 or codes has entries of Q^T Q - I up to 0.004, and the closed form of the residual's square is off by
# little more than that part of the gradient's.
NEGLIGIBLE = 0.1


def is_coded(state: Mapping[str, Any], name: str) -> bool:
    """Whether this tensor of a state, which is no whole moment, is kept as codes."""
    return name in CODES and name + SCALE in state


def value(state: Mapping[str, Any], name: str) -> Tensor:
    """Such a tensor in fp32."""
    stored: Tensor = state[name]
    return decode(stored, state[name + SCALE], CODES[name]) if is_coded(state, name) else stored.float()


def negligible(state: Mapping[str, Any]) -> float:
    """Beside the gradient, or X of a whole moment: the part of it below which the closed form of a rest is noise."""
    return F.NEGLIGIBLE if "basis" not in state or state["basis"].dtype == torch.float32 else NEGLIGIBLE


def encode(values: Tensor, code: Code, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Codes (B, rows, r) and scales (B, rows, groups) of finite fp32 values (B, rows, r).

    seeds: of the draws, one for each of B, by which each gets one of its two neighbours at random, the nearer the
    likelier; None: the nearest. What has no sign and is not zero does not become zero: a first moment would be divided
    by it.
    """
    r, shift = values.shape[-1], 23 - code.bits
    sizes = values.abs()
    padded = torch.nn.functional.pad(sizes, (0, -r % GROUP)) if r % GROUP else sizes
    grouped = padded.unflatten(-1, (-1, GROUP))
    scales = scales_above(grouped.amax(-1))
    z = grouped.mul_((code.span / scales.float()).unsqueeze(-1)).flatten(-2)[..., :r].add_(2.0**-code.octaves)
    found = z.view(torch.int32)
    if seeds is not None:  # from minus a half of a step to just below the other half
        found.add_(_noise(z, seeds), alpha=1 << (shift - 16))
    found.add_((1 << (shift - 1)) - (code.first << shift))
    # A quotient may come out an ulp above its largest value.
    found = found.bitwise_right_shift_(shift).clamp_(0, code.last).to(code.dtype)
    if code.dtype == torch.uint8:
        return found.maximum((values > 0).view(torch.uint8)), scales
    return found.mul_(values.sign().to(code.dtype)), scales


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """fp32 (..., r)."""
    z = codes.int().abs_().add_(code.first).bitwise_left_shift_(23 - code.bits).view(torch.float32)
    values = z.sub_(2.0**-code.octaves).mul_(_spread(scales.float().div_(code.span), codes.shape[-1]))
    return values if code.dtype == torch.uint8 else values.mul_(codes.sign())


def _spread(scales: Tensor, r: int) -> Tensor:
    """The scale of each of r codes, (..., groups) -> (..., r)."""
    return scales.unsqueeze(-1).expand(*scales.shape, GROUP).flatten(-2)[..., :r]


def _noise(like: Tensor, seeds: Sequence[int]) -> Tensor:
    """16 random bits for each element of (B, ...), a signed int32; each of B has draws of its own."""
    draws = [F.generator(like, seed) for seed in seeds]
    return torch.stack(list(map(random_bits, like, draws))).to(torch.int32)
