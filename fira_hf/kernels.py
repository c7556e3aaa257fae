"""The operations of a step in Triton, for accelerators: those of `functional` on lists of matrices, a launch each.

`functional` is the reference, and what runs wherever Triton does not. Here a gradient or a weight is read once by each
operation and a weight is written once, whatever its memory layout; no tensor of the weight's size is made.

What a launch compiles in: dtypes, which strides are 1, the rank and the block sizes. What stays live: addresses and
seeds, which come in one int64 tensor a launch, and numbers such as the learning rate. Kernels that write in place are
not autotuned, which would run them several times on the live tensors. The factors of products are made ready before,
see `factors`.

Products are taken on tensor cores, with errors that do not show. G Q goes into moments that are kept for long: a
half-precision gradient is exact there, and meets the sum of two matrices of its own dtype (relative error 2^-16 in
bf16). The low-rank update of a bf16 weight is one product in bf16: its error, 2^-8 of the update, is as large as the
rounding of the gradient that it was made of, and far below that of the weight. What is fp32 takes three in TF32.
So does X of a whole moment (see `whole`), which beside a half-precision gradient is a bf16 in both passes: what it is
rounded by moves the weight once, and the moment keeps nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import factors
from . import functional as F
from .base_optimizers import orthogonalized
from .code_kernels import decode as decode
from .code_kernels import direction_of_codes as direction_of_codes
from .code_kernels import encode as encode
from .dense_kernel import dense_adamw as dense_adamw
from .factors import DTYPES, about_moments, addresses_of, are_aligned, cdiv, power_of_2, table_of
from .int8_kernel import apply_int8_updates as apply_int8_updates
from .scale_kernels import advance as advance
from .scale_kernels import scales as scales
from .tiles import (
    INTERPRETED,
    dot,
    draws,
    looked_ahead,
    moved,
    pointer,
    read_moment,
    read_scales,
    rounded,
    rounded_by,
    write_moment,
)
from .whole import Whole


@triton.jit
def _project_kernel(
    table, Q, R, norms, long, short, rank, beta, ahead, g_row, g_col, q_row, q_col, q_part, m_row, s_row,
    G_DTYPE: tl.constexpr, PARTS: tl.constexpr, IS_RANGE: tl.constexpr, ALIGNED: tl.constexpr,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, IS_TURNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    WIDTH: tl.constexpr = 2 if MOMENT == "none" else 4
    # Programs of the same rows follow each other, and find the gradient in the cache.
    first_row = tl.program_id(1) * BLOCK_L
    rows = tl.arange(0, BLOCK_L)
    columns = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_S)
    is_row = rows < long - first_row
    place = matrix * long + first_row + rows
    G = pointer(table + WIDTH * matrix, G_DTYPE, ALIGNED) + first_row.to(tl.int64) * g_row
    of_g = rows[:, None] * g_row + inner[None, :] * g_col
    if IS_RANGE:
        first = tl.load(table + WIDTH * matrix + 1)
    else:
        Q += matrix * PARTS * q_part
        of_q = inner[:, None] * q_row + columns[None, :] * q_col
    product = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    # Summed up element by element: the sums over columns come after the loop.
    squares = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
    if MOMENT != "none":
        values = pointer(table + WIDTH * matrix + 2, M_DTYPE, ALIGNED)
        scales = pointer(table + WIDTH * matrix + 3, tl.bfloat16, ALIGNED)
        squares_of_g = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
        scale = read_scales(scales, first_row, 0, long, short, s_row, MOMENT, IS_TURNED, BLOCK_L, BLOCK_S)
    for start in range(0, short, BLOCK_S):
        is_inner = inner < short - start
        is_g = is_row[:, None] & is_inner[None, :]
        g = tl.load(G + of_g, mask=is_g, other=0.0)
        wide = g.to(tl.float32)
        if MOMENT != "none":
            squares_of_g += wide * wide
            m = read_moment(values, scale, first_row, start, long, short, m_row, MOMENT, IS_TURNED, BLOCK_L, BLOCK_S)
            scale = read_scales(
                scales, first_row, start + BLOCK_S, long, short, s_row, MOMENT, IS_TURNED, BLOCK_L, BLOCK_S
            )
            wide = looked_ahead(m, wide, beta, ahead, G_DTYPE, INTERPRETED)
        squares += wide * wide
        if IS_RANGE:
            within = start + inner - first
            chosen = is_g & (within[None, :] >= 0) & (within[None, :] < rank)
            tl.store(R + place[:, None] * rank + within[None, :], wide, mask=chosen)
        else:
            # No arithmetic between loads and products, so that tiles go into shared memory as they are.
            is_q = is_inner[:, None] & (columns[None, :] < rank)
            q = tl.load(Q + of_q, mask=is_q, other=0.0)
            if tl.float32 == G_DTYPE:
                product = tl.dot(g if MOMENT == "none" else wide, q, product, input_precision="tf32x3")
            else:
                x = g if MOMENT == "none" else wide.to(tl.bfloat16)
                low = tl.load(Q + q_part + of_q, mask=is_q, other=0.0)
                product = dot(x, q, product, INTERPRETED)
                product = dot(x, low, product, INTERPRETED)
            Q += BLOCK_S * q_row
        G += BLOCK_S * g_col
    if not IS_RANGE:
        inside = is_row[:, None] & (columns[None, :] < rank)
        tl.store(R + place[:, None] * rank + columns[None, :], product, mask=inside)
    lengths = tl.sqrt(tl.sum(squares, axis=1))
    if MOMENT == "none":
        tl.store(norms + place, lengths, mask=is_row)
    else:
        tl.store(norms + 2 * place, lengths, mask=is_row)
        tl.store(norms + 2 * place + 1, tl.sqrt(tl.sum(squares_of_g, axis=1)), mask=is_row)


@triton.jit
def _direction_kernel(
    table, R, N, R_norms, N_norms, active, long, rank, b1, b2, c1, c2, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, AT_RANDOM: tl.constexpr, BASE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    on = tl.load(active + matrix).to(tl.int32) + tl.zeros((BLOCK_L, BLOCK_R), tl.int32) != 0
    M = pointer(table + 4 * matrix, DTYPE, ALIGNED)
    V = pointer(table + 4 * matrix + 1, DTYPE, ALIGNED)
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < long) & (columns[None, :] < rank) & on
    own = rows[:, None] * rank + columns[None, :]
    place = matrix * long + rows
    r = tl.load(R + place[:, None] * rank + columns[None, :], mask=inside, other=0.0)
    m = tl.load(M + own, mask=inside, other=0.0).to(tl.float32)
    v = m
    if BASE == "adamw":
        v = tl.load(V + own, mask=inside, other=0.0).to(tl.float32)
    n, m, v = moved(r, m, v, inside, b1, b2, c1, c2, eps, BASE)
    if BASE == "adamw":
        tl.store(V + own, rounded(v, tl.load(table + 4 * matrix + 3), own, DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
    tl.store(M + own, rounded(m, tl.load(table + 4 * matrix + 2), own, DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
    written = (rows[:, None] < long) & (columns[None, :] < rank)
    tl.store(N + place[:, None] * rank + columns[None, :], n, mask=written)
    tl.store(R_norms + place, tl.sqrt(tl.sum(r * r, axis=1)), mask=rows < long)
    tl.store(N_norms + place, tl.sqrt(tl.sum(n * n, axis=1)), mask=rows < long)


@triton.jit
def _update_kernel(
    table, A, Q, N, R, a, B, active, long, short, rank, pitch, a_part, k, decay, beta, ahead, share,
    w_row, w_col, g_row, g_col, q_row, q_col, q_part, m_row, s_row,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, PARTS: tl.constexpr, HAS_R: tl.constexpr, HAS_B: tl.constexpr,
    IS_RANGE: tl.constexpr, ALIGNED: tl.constexpr, AT_RANDOM: tl.constexpr,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, IS_TURNED: tl.constexpr, M_AT_RANDOM: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    WIDTH: tl.constexpr = 4 if MOMENT == "none" else 7
    if tl.load(active + matrix) != 0:
        first_row, first_column = tl.program_id(1) * BLOCK_L, tl.program_id(0) * BLOCK_S
        rows, columns = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
        is_row, is_column = rows < long - first_row, columns < short - first_column
        inside = is_row[:, None] & is_column[None, :]
        place = matrix * long + first_row + rows
        # What comes from far is asked for before the product is taken.
        W = pointer(table + WIDTH * matrix, W_DTYPE, ALIGNED)
        W += first_row.to(tl.int64) * w_row + first_column.to(tl.int64) * w_col
        of_w = rows[:, None] * w_row + columns[None, :] * w_col
        w = tl.load(W + of_w, mask=inside, other=0.0)
        if HAS_B:
            b = tl.load(B + place, mask=is_row, other=0.0)
            G = pointer(table + WIDTH * matrix + 1, G_DTYPE, ALIGNED)
            G += first_row.to(tl.int64) * g_row + first_column.to(tl.int64) * g_col
            g = tl.load(G + rows[:, None] * g_row + columns[None, :] * g_col, mask=inside, other=0.0)
        product = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
        if IS_RANGE:
            within = first_column + columns - tl.load(table + WIDTH * matrix + 2)
            chosen = is_row[:, None] & (within[None, :] >= 0) & (within[None, :] < rank)
            part = tl.load(N + place[:, None] * rank + within[None, :], mask=chosen, other=0.0)
            product = tl.load(a + matrix) * part
            if HAS_R:
                part = tl.load(R + place[:, None] * rank + within[None, :], mask=chosen, other=0.0)
                product -= (k * b)[:, None] * part
        else:
            inner = tl.arange(0, BLOCK_R)
            A += matrix * PARTS * a_part + first_row.to(tl.int64) * pitch
            Q += matrix * PARTS * q_part + first_column.to(tl.int64) * q_row
            of_a = rows[:, None] * pitch + inner[None, :]
            of_q = columns[None, :] * q_row + inner[:, None] * q_col
            for start in range(0, rank, BLOCK_R):
                is_a = is_row[:, None] & (inner[None, :] < pitch - start)
                is_q = (inner[:, None] < rank - start) & is_column[None, :]
                n = tl.load(A + of_a, mask=is_a, other=0.0)
                q = tl.load(Q + of_q, mask=is_q, other=0.0)
                if tl.float32 == W_DTYPE:
                    product = tl.dot(n, q, product, input_precision="tf32x3")
                else:
                    product = dot(n, q, product, INTERPRETED)
                if PARTS == 2:
                    n_low = tl.load(A + a_part + of_a, mask=is_a, other=0.0)
                    q_low = tl.load(Q + q_part + of_q, mask=is_q, other=0.0)
                    product = dot(n, q_low, product, INTERPRETED)
                    product = dot(n_low, q, product, INTERPRETED)
                A += BLOCK_R
                Q += BLOCK_R * q_col
        new = w.to(tl.float32) - product
        if HAS_B:
            wide = g.to(tl.float32)
            x = wide
            if MOMENT != "none":
                values = pointer(table + WIDTH * matrix + 4, M_DTYPE, ALIGNED)
                scales = pointer(table + WIDTH * matrix + 5, tl.bfloat16, ALIGNED)
                scale = read_scales(
                    scales, first_row, first_column, long, short, s_row, MOMENT, IS_TURNED, BLOCK_L, BLOCK_S
                )
                m = read_moment(
                    values, scale, first_row, first_column, long, short, m_row, MOMENT, IS_TURNED, BLOCK_L, BLOCK_S
                )
                x = looked_ahead(m, wide, beta, ahead, G_DTYPE, INTERPRETED)
            new -= b[:, None] * x
        new *= decay
        noise = tl.zeros((BLOCK_L, BLOCK_S), tl.uint32)
        if AT_RANDOM or M_AT_RANDOM:
            seed = tl.load(table + WIDTH * matrix + (3 if AT_RANDOM else 6))
            noise = draws(seed, (first_row + rows)[:, None] * short + (first_column + columns)[None, :])
        tl.store(W + of_w, rounded_by(new, noise >> 16, W_DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
        if MOMENT != "none":
            write_moment(
                beta * m + share * wide, noise & 0xFFFF, values, scales, first_row, first_column, long, short,
                m_row, s_row, MOMENT, M_DTYPE, IS_TURNED, M_AT_RANDOM, INTERPRETED, BLOCK_L, BLOCK_S,
            )  # fmt: skip


def _ranges_within(bases: Sequence[F.Basis], short: int) -> list[range]:
    """The bases, if all are ranges of columns of which none lies outside."""
    ranges = [Q for Q in bases if isinstance(Q, range) and Q.start >= 0 and Q.stop <= short]
    return ranges if len(ranges) == len(bases) else []


def project(
    grads: Sequence[Tensor], bases: Sequence[F.Basis], moments: Sequence[Whole] | None = None, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `functional.project`. One pass over G for up to 128 columns of Q (fp32: 64), or for a range.

    With `moments`, X is projected in place of G, and there are its norms as well: see `whole.project`.
    """
    (long, short), rank = grads[0].shape, F.rank_of(bases[0])
    is_range = isinstance(bases[0], range)
    is_filled = not is_range or bool(_ranges_within(bases, short))
    R = (torch.empty if is_filled else torch.zeros)(len(grads), long, rank, device=grads[0].device)
    norms = R.new_empty(len(grads), long, 1 if moments is None else 2)
    of_moments, compiled = about_moments(moments)
    dtype, addresses = grads[0].dtype, addresses_of(moments)
    # By what ptxas says for compute capabilities 8 and 9, without spilled registers and in 99 KiB of shared memory. Of
    # 64 rows, the two products of 8 warps would go from one layout to another, through shared memory.
    is_half, is_plain = dtype != torch.float32, moments is None
    block_r = 16 if is_range else power_of_2(rank, 16, 64 if is_plain and not is_half else 128)
    block_l, block_s = (32, 256) if is_range else (128 if is_half or is_plain else 32, 32)
    if long:
        table = table_of(grads, bases, *addresses)
        of_bases = [R, 0, 0, 0]
        if not is_range:
            kept = dtype if is_plain or not is_half else torch.bfloat16
            Q = factors.of_bases(bases, table, 1, kept, 2 if is_half else 1)
            of_bases = [Q.values, *Q.strides, Q.part]
        _project_kernel[1 if is_range else cdiv(rank, block_r), cdiv(long, block_l), len(grads)](
            table, of_bases[0], R, norms, long, short, rank, beta, 1 - beta**2,
            *grads[0].stride(), *of_bases[1:], *of_moments,
            G_DTYPE=DTYPES[dtype], PARTS=2 if is_half else 1, IS_RANGE=is_range,
            ALIGNED=are_aligned(grads, *addresses), **compiled, INTERPRETED=INTERPRETED,
            BLOCK_L=block_l, BLOCK_S=block_s, BLOCK_R=block_r, num_warps=4 if is_range else 8,
            num_stages=(4 if is_plain else 3) if is_half else 2,
        )  # fmt: skip
    return R, norms


def project_moments(
    grads: Sequence[Tensor], moments: Sequence[Whole], bases: Sequence[Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """See `whole.project`. One pass over gradient and moment, as `project` makes one over the gradient."""
    return project(grads, bases, moments, beta)


def transposed_products(grads: Sequence[Tensor], P: Tensor) -> Tensor:
    """See `functional.transposed_products`."""
    return project([G.t() for G in grads], list(P))[0]


def direction(
    base_optimizer: str,
    R: Tensor,
    stored: Sequence[Sequence[Tensor]],
    betas: tuple[float, float],
    eps: float,
    active: Tensor,
    seeds: Sequence[Sequence[int]] | None = None,
    add: F.Add = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.direction`, which makes Adafactor's, with means over both sides. One pass over R and moments."""
    if base_optimizer == "adafactor":
        return F.direction(base_optimizer, R, list(map(list, stored)), betas, eps, active, seeds, add)
    count, long, rank = R.shape
    M, V = stored[0], stored[-1]  # the others have one, and read no other
    N = torch.empty_like(R)
    R_norms, N_norms = R.new_empty(count, long, 1), R.new_empty(count, long, 1)
    block_r = power_of_2(rank)
    block_l = max(1, 2**11 // block_r)
    if long:
        none = [0] * count
        _direction_kernel[cdiv(long, block_l), count](
            table_of(M, V, seeds[0] if seeds else none, seeds[-1] if seeds else none),
            R, N, R_norms, N_norms, active, long, rank, *betas, *(1 - b for b in betas), eps,
            DTYPE=DTYPES[M[0].dtype], ALIGNED=are_aligned(M, V),
            AT_RANDOM=seeds is not None and M[0].dtype == torch.bfloat16,
            BASE=base_optimizer, INTERPRETED=INTERPRETED, BLOCK_L=block_l, BLOCK_R=block_r,
        )  # fmt: skip
    if base_optimizer == "muon":
        N = orthogonalized(N, add)
        N_norms = F.row_norms(N)
    return N, R_norms, N_norms


def apply_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    N: Tensor,
    R: Tensor | None,
    a: Tensor | None,
    k: float,
    B: Tensor | None,
    bases: Sequence[F.Basis],
    decay: float,
    active: Tensor,
    seeds: Sequence[int] | None = None,
    moments: Sequence[Whole] | None = None,
    beta: float = 0.0,
    moment_seeds: Sequence[int] | None = None,
) -> None:
    """See `functional.apply_updates`. One pass over W and G, the product with Q^T included. `a`: None is 1."""
    count, long, rank = N.shape
    short = weights[0].shape[1]
    ranges = _ranges_within(bases, short)
    if B is None and decay == 1 and ranges:
        # Nothing is done to what is outside: the block is the whole matrix.
        weights = [W[:, Q.start : Q.stop] for W, Q in zip(weights, ranges, strict=True)]
        bases, short = [range(rank)] * count, rank
    if not long or not short:
        return
    N, B, R = N.contiguous(), None if B is None else B.contiguous(), None if B is None else R
    dtype, is_range = weights[0].dtype, isinstance(bases[0], range)
    none = [0] * count
    of_moments, compiled = about_moments(moments)
    addresses = () if moments is None else (*addresses_of(moments), moment_seeds or none)
    table, parts = table_of(weights, grads, bases, seeds or none, *addresses), 2 if dtype == torch.float16 else 1
    low_rank: list[Any] = [N, N, 0, 0, 0, 0, 0]
    if is_range and a is None:
        a = N.new_ones(count)
    if not is_range:
        kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
        A, Q = factors.of_update(N, R, a, B, k, kept, parts), factors.of_bases(bases, table, 2, kept, parts)
        low_rank = [A.values, Q.values, A.strides[0], A.part, *Q.strides, Q.part]
    # With a moment each thread holds more, and smaller programs fit beside each other.
    block_l = 128 if moments is None else 64
    _update_kernel[cdiv(short, 64), cdiv(long, block_l), count](
        table, *low_rank[:2], N, N if R is None else R, N if a is None else a, N if B is None else B, active,
        long, short, rank, *low_rank[2:4], k, decay, beta, 1 - beta**2, 1 - beta,
        *weights[0].stride(), *grads[0].stride(), *low_rank[4:], *of_moments,
        W_DTYPE=DTYPES[dtype], G_DTYPE=DTYPES[grads[0].dtype], PARTS=parts,
        HAS_R=R is not None, HAS_B=B is not None, IS_RANGE=is_range,
        ALIGNED=are_aligned(weights, grads, *addresses), AT_RANDOM=seeds is not None,
        **compiled, M_AT_RANDOM=moment_seeds is not None and compiled["M_DTYPE"] != tl.float32,
        INTERPRETED=INTERPRETED, BLOCK_L=block_l, BLOCK_S=64, BLOCK_R=16 if dtype == torch.float32 else 64,
        num_warps=block_l // 16, num_stages=2,
    )  # fmt: skip


def apply_moment_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Whole],
    A: Tensor,
    B: Tensor,
    bases: Sequence[Tensor],
    decay: float,
    beta: float,
    active: Tensor,
    seeds: Sequence[int] | None,
    moment_seeds: Sequence[int] | None,
) -> None:
    """See `whole.apply_updates`. One pass over W, G and the moment. With `seeds`, moments are rounded by the draws of
    their weights, by other bits of them."""
    of_moments = (moments, beta, moment_seeds)
    apply_updates(weights, grads, A, None, None, 0.0, B, bases, decay, active, seeds, *of_moments)
