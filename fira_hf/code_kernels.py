"""The operations of `codes` in Triton: one launch for all matrices of a shape, in place of torch's passes one by one.

Moments are decoded, updated and encoded in registers, and each code is read and written once. Addresses and seeds come
in a table, as in `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import functional as F
from .base_optimizers import orthogonalized
from .codes import FIRST, SECOND, Code
from .factors import are_aligned, cdiv, power_of_2, table_of
from .tiles import GROUP, TINY, draws, moved, pointer
from .whole import GROUP as WITH_ONE_SCALE

ELEMENTS = 2**11  # of a program
Moment = tuple[Sequence[Tensor], Sequence[Tensor]]  # codes and scales of each matrix


@triton.jit
def _read(
    codes, scales, rows, is_row, rank,
    SIGNED: tl.constexpr, OCTAVES: tl.constexpr, BITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows (int64) of a matrix of codes and scales, (rows, BLOCK_R) fp32; zero outside."""
    columns = tl.arange(0, BLOCK_R)
    group = tl.arange(0, BLOCK_R // GROUP)
    groups = (rank + GROUP - 1) // GROUP
    inside = is_row[:, None] & (columns[None, :] < rank)
    code = tl.load(codes + rows[:, None] * rank + columns[None, :], mask=inside, other=0).to(tl.int32)
    is_group = is_row[:, None] & (group[None, :] < groups)
    scale = tl.load(scales + rows[:, None] * groups + group[None, :], mask=is_group, other=0.0).to(tl.float32)
    scale /= 2 - 1 / (1 << BITS) - 1 / (1 << OCTAVES)
    z = ((tl.abs(code) + ((127 - OCTAVES) << BITS)) << (23 - BITS)).to(tl.float32, bitcast=True)
    x = z - 1 / (1 << OCTAVES)
    if SIGNED:
        x = tl.where(code < 0, -x, x)
    x = tl.reshape(x, (x.shape[0], BLOCK_R // GROUP, GROUP)) * scale[:, :, None]
    return tl.reshape(x, (x.shape[0], BLOCK_R))


@triton.jit
def _write(
    x, codes, scales, rows, is_row, rank, seed,
    SIGNED: tl.constexpr, OCTAVES: tl.constexpr, BITS: tl.constexpr, AT_RANDOM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes such rows, which are zero outside."""
    columns = tl.arange(0, BLOCK_R)
    group = tl.arange(0, BLOCK_R // GROUP)
    groups = (rank + GROUP - 1) // GROUP
    sizes = tl.reshape(tl.abs(x), (x.shape[0], BLOCK_R // GROUP, GROUP))
    scale = tl.maximum(tl.max(sizes, axis=2), TINY)
    scale = ((scale.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)
    is_group = is_row[:, None] & (group[None, :] < groups)
    tl.store(scales + rows[:, None] * groups + group[None, :], scale.to(tl.bfloat16), mask=is_group)
    factor = (2 - 1 / (1 << BITS) - 1 / (1 << OCTAVES)) / scale
    z = tl.reshape(sizes * factor[:, :, None], (x.shape[0], BLOCK_R)) + 1 / (1 << OCTAVES)
    place = rows[:, None] * rank + columns[None, :]
    if AT_RANDOM:
        noise = ((draws(seed, place) >> 16) << (7 - BITS)).to(tl.int32)
    else:
        noise = 1 << (22 - BITS)
    found = ((z.to(tl.int32, bitcast=True) + noise) >> (23 - BITS)) - ((127 - OCTAVES) << BITS)
    found = tl.minimum(found, ((OCTAVES + 1) << BITS) - 1)
    if SIGNED:
        found = tl.where(x < 0, -found, found).to(tl.int8)
    else:
        found = tl.maximum(found, tl.where(x > 0, 1, 0)).to(tl.uint8)
    tl.store(codes + place, found, mask=is_row[:, None] & (columns[None, :] < rank))


@triton.jit
def _decode_kernel(
    table, numbers, outer, rank,
    DTYPE: tl.constexpr, OCTAVES: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_R)
    codes = pointer(table + 2 * matrix, DTYPE, ALIGNED)
    scales = pointer(table + 2 * matrix + 1, tl.bfloat16, ALIGNED)
    x = _read(codes, scales, rows, rows < outer, rank, tl.int8 == DTYPE, OCTAVES, BITS, BLOCK_R)
    place = (matrix * outer + rows)[:, None] * rank + columns[None, :]
    tl.store(numbers + place, x, mask=(rows[:, None] < outer) & (columns[None, :] < rank))


@triton.jit
def _direction_kernel(
    table, R, N, R_norms, N_norms, active, long, rank, b1, b2, c1, c2, eps,
    M_OCTAVES: tl.constexpr, M_BITS: tl.constexpr, V_OCTAVES: tl.constexpr, V_BITS: tl.constexpr,
    ALIGNED: tl.constexpr, AT_RANDOM: tl.constexpr, BASE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    on = tl.load(active + matrix).to(tl.int32) + tl.zeros((BLOCK_L,), tl.int32) != 0
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_R)
    is_row = (rows < long) & on
    inside = is_row[:, None] & (columns[None, :] < rank)
    place = (matrix * long + rows)[:, None] * rank + columns[None, :]
    r = tl.load(R + place, mask=inside, other=0.0)
    M = pointer(table + 6 * matrix, tl.int8, ALIGNED)
    M_scales = pointer(table + 6 * matrix + 1, tl.bfloat16, ALIGNED)
    m = _read(M, M_scales, rows, is_row, rank, True, M_OCTAVES, M_BITS, BLOCK_R)
    v = m
    if BASE == "adamw":
        V = pointer(table + 6 * matrix + 3, tl.uint8, ALIGNED)
        V_scales = pointer(table + 6 * matrix + 4, tl.bfloat16, ALIGNED)
        v = _read(V, V_scales, rows, is_row, rank, False, V_OCTAVES, V_BITS, BLOCK_R)
    n, m, v = moved(r, m, v, inside, b1, b2, c1, c2, eps, BASE)
    if BASE == "adamw":
        seed = tl.load(table + 6 * matrix + 5)
        _write(v, V, V_scales, rows, is_row, rank, seed, False, V_OCTAVES, V_BITS, AT_RANDOM, BLOCK_R)
    _write(
        m, M, M_scales, rows, is_row, rank, tl.load(table + 6 * matrix + 2),
        True, M_OCTAVES, M_BITS, AT_RANDOM, BLOCK_R,
    )  # fmt: skip
    is_row = rows < long
    tl.store(N + place, n, mask=is_row[:, None] & (columns[None, :] < rank))
    tl.store(R_norms + matrix * long + rows, tl.sqrt(tl.sum(r * r, axis=1)), mask=is_row)
    tl.store(N_norms + matrix * long + rows, tl.sqrt(tl.sum(n * n, axis=1)), mask=is_row)


@triton.jit
def _encode_kernel(
    table, X, active, outer, rank,
    DTYPE: tl.constexpr, OCTAVES: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, AT_RANDOM: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_R)
    is_row = rows < outer
    if HAS_ACTIVE:
        is_row = is_row & (tl.load(active + matrix).to(tl.int32) + tl.zeros((BLOCK_L,), tl.int32) != 0)
    place = (matrix * outer + rows)[:, None] * rank + columns[None, :]
    x = tl.load(X + place, mask=is_row[:, None] & (columns[None, :] < rank), other=0.0)
    codes = pointer(table + 3 * matrix, DTYPE, ALIGNED)
    scales = pointer(table + 3 * matrix + 1, tl.bfloat16, ALIGNED)
    seed = tl.load(table + 3 * matrix + 2)
    _write(x, codes, scales, rows, is_row, rank, seed, tl.int8 == DTYPE, OCTAVES, BITS, AT_RANDOM, BLOCK_R)


def _blocks(rank: int) -> tuple[int, int]:
    block_r = power_of_2(rank, WITH_ONE_SCALE)
    return max(1, ELEMENTS // block_r), block_r


def decode(stored: Sequence[Tensor], scales: Sequence[Tensor], code: Code) -> Tensor:
    """See `codes.decode`: of each matrix, (B, rows, r) fp32."""
    rows, rank = stored[0].shape
    out = torch.empty(len(stored), rows, rank, dtype=torch.float32, device=stored[0].device)
    block_l, block_r = _blocks(rank)
    if rows:
        _decode_kernel[cdiv(rows, block_l), len(stored)](
            table_of(stored, scales), out, rows, rank, DTYPE=tl.int8 if code.dtype == torch.int8 else tl.uint8,
            OCTAVES=code.octaves, BITS=code.bits, ALIGNED=are_aligned(stored, scales),
            BLOCK_L=block_l, BLOCK_R=block_r,
        )  # fmt: skip
    return out


def encode(
    values: Tensor,
    stored: Sequence[Tensor],
    scales: Sequence[Tensor],
    code: Code,
    active: Tensor | None,
    seeds: Sequence[int] | None,
) -> None:
    """See `codes.encode`: of fp32 values (B, rows, r), into codes and scales of each matrix that is `active`."""
    rows, rank = stored[0].shape
    block_l, block_r = _blocks(rank)
    if rows:
        _encode_kernel[cdiv(rows, block_l), len(stored)](
            table_of(stored, scales, seeds or [0] * len(stored)), values, values if active is None else active,
            rows, rank, DTYPE=tl.int8 if code.dtype == torch.int8 else tl.uint8, OCTAVES=code.octaves,
            BITS=code.bits, ALIGNED=are_aligned(stored, scales), HAS_ACTIVE=active is not None,
            AT_RANDOM=seeds is not None, BLOCK_L=block_l, BLOCK_R=block_r,
        )  # fmt: skip


def direction_of_codes(
    base_optimizer: str,
    R: Tensor,
    moments: Sequence[Moment],
    betas: tuple[float, float],
    eps: float,
    active: Tensor,
    seeds: Sequence[Sequence[int]] | None = None,
    add: F.Add = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.direction`, of moments in codes; not for Adafactor. One pass over R and codes."""
    count, long, rank = R.shape
    M, V = moments[0], moments[-1]  # the others have one, and read no other
    N = torch.empty_like(R)
    R_norms, N_norms = R.new_empty(count, long, 1), R.new_empty(count, long, 1)
    block_l, block_r = _blocks(rank)
    if long:
        none = [0] * count
        of_seeds: Any = (seeds[0], seeds[-1]) if seeds else (none, none)
        _direction_kernel[cdiv(long, block_l), count](
            table_of(*M, of_seeds[0], *V, of_seeds[1]),
            R, N, R_norms, N_norms, active, long, rank, *betas, *(1 - b for b in betas), eps,
            M_OCTAVES=FIRST.octaves, M_BITS=FIRST.bits, V_OCTAVES=SECOND.octaves, V_BITS=SECOND.bits,
            ALIGNED=are_aligned(*M, *V), AT_RANDOM=seeds is not None, BASE=base_optimizer,
            BLOCK_L=block_l, BLOCK_R=block_r,
        )  # fmt: skip
    if base_optimizer == "muon":
        N = orthogonalized(N, add)
        N_norms = F.row_norms(N)
    return N, R_norms, N_norms
