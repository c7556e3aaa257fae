"""The update of int8 weights in Triton, for accelerators: what `int8.apply_updates` does, in one launch.

A program has whole rows of the weight as it is stored, and goes over them twice: for the largest value of each row,
which decides on its scale, and to write codes. The update is computed both times, so a gradient is read twice here
and no tensor of the weight's size is made. Products are those of `kernels`: in bf16 beside half-precision gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import factors, int8
from . import functional as F
from .factors import DTYPES, are_aligned, cdiv, table_of
from .tiles import INTERPRETED, dot, draws, pointer, rounded_by

MOST, LEAST = tl.constexpr(float(int8.MOST)), tl.constexpr(float(int8.LEAST))


@triton.jit
def _updated(
    codes, scale, G, U, V, b, B, first_column, columns, rank, decay, is_row, c_row, g_row, g_col, u_row, u_col,
    v_row, v_col,
    HAS_B: tl.constexpr, IS_TURNED: tl.constexpr, IS_FP32: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """decay (W - U V^T - B G) of a tile, fp32, zero outside; pointers are at its first row."""
    rows, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    j = first_column + tl.arange(0, COLUMNS)
    is_column = j < columns
    inside = is_row[:, None] & is_column[None, :]
    w = tl.load(codes + rows[:, None] * c_row + j[None, :], mask=inside, other=0)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + inner
        is_inner = r < rank
        u = tl.load(
            U + rows[:, None] * u_row + r[None, :] * u_col, mask=is_row[:, None] & is_inner[None, :], other=0.0
        )
        v = tl.load(
            V + j[None, :] * v_row + r[:, None] * v_col, mask=is_inner[:, None] & is_column[None, :], other=0.0
        )
        if IS_FP32:
            product = tl.dot(u, v, product, input_precision="tf32x3")
        else:
            product = dot(u, v, product, INTERPRETED)
    new = w.to(tl.float32) * scale[:, None] - product
    if HAS_B:
        g = tl.load(G + rows[:, None] * g_row + j[None, :] * g_col, mask=inside, other=0.0).to(tl.float32)
        if IS_TURNED:
            new -= tl.load(B + j, mask=is_column, other=0.0)[None, :] * g
        else:
            new -= b[:, None] * g
    return new * decay


@triton.jit
def _int8_update_kernel(
    table, U, V, B, active, rows, columns, rank, decay, eps, tiny, c_row, s_row, g_row, g_col,
    u_matrix, u_row, u_col, v_matrix, v_row, v_col,
    S_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, HAS_B: tl.constexpr, IS_TURNED: tl.constexpr, IS_FP32: tl.constexpr,
    ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    if tl.load(active + matrix) != 0:
        first = tl.program_id(0).to(tl.int64) * ROWS
        own = tl.arange(0, ROWS)
        is_row = own < rows - first
        codes = pointer(table + 4 * matrix, tl.int8, ALIGNED) + first * c_row
        scales = pointer(table + 4 * matrix + 1, S_DTYPE, ALIGNED) + first * s_row
        G = pointer(table + 4 * matrix + 2, G_DTYPE, ALIGNED) + first * g_row
        seed = tl.load(table + 4 * matrix + 3)
        U += matrix * u_matrix + first * u_row
        V += matrix * v_matrix
        b = tl.zeros((ROWS,), tl.float32)
        if HAS_B:
            B += matrix * (columns if IS_TURNED else rows)
            if not IS_TURNED:
                b = tl.load(B + first + own, mask=is_row, other=0.0)
        before = tl.load(scales + own * s_row, mask=is_row, other=1.0).to(tl.float32)
        largest = tl.zeros((ROWS,), tl.float32)
        for start in range(0, columns, COLUMNS):
            new = _updated(
                codes, before, G, U, V, b, B, start, columns, rank, decay, is_row, c_row, g_row, g_col,
                u_row, u_col, v_row, v_col, HAS_B, IS_TURNED, IS_FP32, INTERPRETED, ROWS, COLUMNS, BLOCK_R,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.abs(new), axis=1))
        # As in `int8.encode`.
        least = largest / MOST
        fits = (least <= before) & (least * MOST >= before * LEAST)
        fresh = rounded_by(tl.maximum(least * (1 + eps), tiny), 0, S_DTYPE, False, INTERPRETED).to(tl.float32)
        scale = tl.where(fits, before, fresh)
        tl.store(scales + own * s_row, scale.to(S_DTYPE), mask=is_row)
        for start in range(0, columns, COLUMNS):
            new = _updated(
                codes, before, G, U, V, b, B, start, columns, rank, decay, is_row, c_row, g_row, g_col,
                u_row, u_col, v_row, v_col, HAS_B, IS_TURNED, IS_FP32, INTERPRETED, ROWS, COLUMNS, BLOCK_R,
            )  # fmt: skip
            new = new / scale[:, None]
            low = tl.floor(new)
            j = start + tl.arange(0, COLUMNS)
            noise = draws(seed, (first + own)[:, None] * columns + j[None, :]) >> 8
            code = low + tl.where(noise.to(tl.float32) * (1 / 16777216) < new - low, 1.0, 0.0)
            code = tl.minimum(tl.maximum(code, -MOST), MOST)
            inside = is_row[:, None] & (j[None, :] < columns)
            tl.store(codes + own[:, None] * c_row + j[None, :], code.to(tl.int8), mask=inside)


def apply_int8_updates(
    weights: Sequence[int8.Int8Weight],
    grads: Sequence[Tensor],
    N: Tensor,
    R: Tensor | None,
    a: Tensor,
    k: float,
    B: Tensor | None,
    bases: Sequence[F.Basis],
    decay: float,
    active: Tensor,
    seeds: Sequence[int],
) -> None:
    """See `int8.apply_updates`, which takes ranges of columns."""
    if isinstance(bases[0], range):
        int8.apply_updates(weights, grads, N, R, a, k, B, bases, decay, active, seeds)
        return
    turned, scales = weights[0].is_turned, [W.scales for W in weights]
    rows, columns = weights[0].codes.shape
    if not rows or not columns:
        return
    R, B = None if B is None else R, None if B is None else B.contiguous()
    grads = [G.t() for G in grads] if turned else grads
    table = table_of([W.codes for W in weights], scales, grads, seeds)
    kept = torch.float32 if grads[0].dtype == torch.float32 else torch.bfloat16
    A = factors.of_update(N.contiguous(), R, a, B, k, kept, 1)
    Q = factors.of_bases(bases, table_of(bases), 0, kept, 1)
    # A is (matrices, long, pitch), and a long row is a stored one unless turned.
    sides = [(A.values, (N.shape[1] * A.strides[0], A.strides[0], 1)), (Q.values, (Q.part, *Q.strides))]
    (U, of_u), (V, of_v) = reversed(sides) if turned else sides
    finfo = torch.finfo(scales[0].dtype)
    _int8_update_kernel[cdiv(rows, 64), len(weights)](
        table, U, V, N if B is None else B, active, rows, columns, N.shape[2], decay, finfo.eps, finfo.tiny,
        weights[0].codes.stride(0), scales[0].stride(0), *grads[0].stride(), *of_u, *of_v,
        S_DTYPE=DTYPES[scales[0].dtype], G_DTYPE=DTYPES[grads[0].dtype], HAS_B=B is not None, IS_TURNED=turned,
        IS_FP32=kept == torch.float32, ALIGNED=are_aligned([W.codes for W in weights], scales, grads),
        INTERPRETED=INTERPRETED, ROWS=64, COLUMNS=64, BLOCK_R=32 if kept == torch.float32 else 64,
        num_warps=4, num_stages=2,
    )  # fmt: skip
