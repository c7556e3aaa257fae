"""What the kernels in `kernels` are given: tables of addresses, and the low-rank factors of their products, made ready
for tensor cores before the passes over gradients and weights.

A pass reads the same factor in each of its programs. So what is done to it (sums, conversions) is done once, in a pass
over low-rank elements alone, and the large passes copy finished tiles straight into shared memory.

A factor of B matrices is (B, parts, outer, pitch): as it lies in memory, where `inner` of a row's elements are filled
and zeros follow up to a multiple of 16, so that every row begins at an address that can be copied 16 bytes at a time.
Two parts are a sum of two of the narrower dtype.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INTERPRETED, halves, rounded_by
from .whole import Whole

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OF_MOMENTS = {  # how a moment is kept, by the dtype of its values
    torch.float32: ("float", tl.float32),
    torch.bfloat16: ("float", tl.bfloat16),
    torch.int8: ("int8", tl.int8),
    torch.uint8: ("int4", tl.uint8),
}
BLOCK = 2048


@triton.jit
def _factor_kernel(
    table, X, R, a, B, out, outer, inner, pitch, part, x_row, x_col, k, width, column,
    X_DTYPE: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_R: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (i[:, None] < outer) & (j[None, :] < inner)
    place = i[:, None] * x_row + j[None, :] * x_col
    if HAS_TABLE:
        X = tl.load(table + width * matrix + column).to(tl.pointer_type(X_DTYPE))
        x = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(X + matrix * outer * inner + place, mask=inside, other=0.0)
        if HAS_SCALE:
            x *= tl.load(a + matrix)
        if HAS_R:
            b = k * tl.load(B + matrix * outer + i, mask=i < outer, other=0.0)
            x -= b[:, None] * tl.load(R + matrix * outer * inner + place, mask=inside, other=0.0)
    written = (i[:, None] < outer) & (j[None, :] < pitch)
    out += matrix * PARTS * part + i[:, None] * pitch + j[None, :]
    if PARTS == 1:
        tl.store(out, rounded_by(x, 0, DTYPE, False, INTERPRETED), mask=written)
    else:
        high, low = halves(x, DTYPE, INTERPRETED)
        tl.store(out, high, mask=written)
        tl.store(out + part, low, mask=written)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's, which kernels can call too, takes ten times as long on the host."""
    return -(-size // block)


def power_of_2(size: int, least: int = 1, most: int = 2**31) -> int:
    """The next one, within bounds."""
    return min(most, max(least, 1 << max(0, size - 1).bit_length()))


def table_of(*columns: Sequence[Any]) -> Tensor:
    """(matrices, columns) int64 on the device: addresses of tensors, first ones of ranges, and numbers."""
    device = next(column[0].device for column in columns if isinstance(column[0], Tensor))
    flat = array("q", itertools.chain.from_iterable(zip(*map(_numbers, columns), strict=True)))
    # A copy of so little has left the host's memory when it is started, which it need not be pinned for.
    table = torch.frombuffer(flat, dtype=torch.int64).view(-1, len(columns))
    return table.to(device, non_blocking=True)


def _numbers(column: Sequence[Any]) -> Sequence[int]:
    """Of things of one kind."""
    if isinstance(column[0], Tensor):
        return [x.data_ptr() for x in column]
    return [x.start for x in column] if isinstance(column[0], range) else column


def are_aligned(*columns: Sequence[Any]) -> bool:
    """Whether all tensors among these begin at multiples of 16 bytes; of strides Triton sees by itself."""
    of_tensors = [column for column in columns if isinstance(column[0], Tensor)]
    return not any(x.data_ptr() & 15 for column in of_tensors for x in column)


def about_moments(moments: Sequence[Whole] | None) -> tuple[tuple[int, int], dict[str, Any]]:
    """What a kernel is told of moments: the strides of rows of values and scales, and what it compiles in."""
    if moments is None:
        return (0, 0), {"MOMENT": "none", "M_DTYPE": tl.float32, "IS_TURNED": False}
    values, scales = moments[0].values, moments[0].scales
    kind, dtype = OF_MOMENTS[values.dtype]
    strides = (values.stride(0), 0 if scales is None else scales.stride(0))
    return strides, {"MOMENT": kind, "M_DTYPE": dtype, "IS_TURNED": moments[0].is_turned}


def addresses_of(moments: Sequence[Whole] | None) -> tuple[list[Any], ...]:
    """Columns of a table: values and scales; none without moments."""
    if moments is None:
        return ()
    return [M.values for M in moments], [0 if M.scales is None else M.scales for M in moments]


@dataclass(frozen=True)
class Factor:
    """`values` (B, parts, outer, pitch), and the strides of a matrix's rows and columns in them."""

    values: Tensor
    strides: tuple[int, int]

    @property
    def part(self) -> int:
        return self.values.stride(1)


def of_bases(bases: Sequence[Any], table: Tensor, column: int, dtype: torch.dtype, parts: int) -> Factor:
    """Q of each matrix; their addresses are in a column of the table. It lies as the bases do."""
    Q = bases[0]
    is_turned = Q.stride(0) == 1 or Q.shape[1] == 1
    lying = Q.t() if is_turned else Q
    values = _empty(len(bases), parts, lying, dtype)
    none = values
    _launch(
        lying, values, table, none, none, none, none, *lying.stride(), 0.0, table.shape[1], column,
        X_DTYPE=DTYPES[Q.dtype], HAS_TABLE=True, HAS_SCALE=False, HAS_R=False,
    )  # fmt: skip
    pitch = values.stride(2)
    return Factor(values, (1, pitch) if is_turned else (pitch, 1))


def of_update(
    N: Tensor, R: Tensor | None, a: Tensor | None, B: Tensor | None, k: float, dtype: torch.dtype, parts: int
) -> Factor:
    """A = a N - k B R."""
    values = _empty(len(N), parts, N[0], dtype)
    has_R = R is not None and B is not None
    _launch(
        N[0], values, values, N, R if has_R else N, N if a is None else a, B if has_R else N, N.stride(1), 1, k, 0, 0,
        X_DTYPE=tl.float32, HAS_TABLE=False, HAS_SCALE=a is not None, HAS_R=has_R,
    )  # fmt: skip
    return Factor(values, (values.stride(2), 1))


def _empty(count: int, parts: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    outer, inner = like.shape
    return torch.empty(count, parts, outer, 16 * cdiv(inner, 16), dtype=dtype, device=like.device)


def _launch(like: Tensor, values: Tensor, table: Tensor, *rest: Any, **compiled: Any) -> None:
    count, parts, outer, pitch = values.shape
    if not values.numel():
        return
    block_i = power_of_2(pitch, most=256)
    block_o = BLOCK // block_i
    X, R, a, B, *numbers = rest
    _factor_kernel[cdiv(outer, block_o), cdiv(pitch, block_i), count](
        table, X, R, a, B, values, outer, like.shape[1], pitch, values.stride(1), *numbers,
        DTYPE=DTYPES[values.dtype], PARTS=parts, **compiled, INTERPRETED=INTERPRETED, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
