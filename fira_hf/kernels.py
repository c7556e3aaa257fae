"""The operations of a step in Triton, for accelerators: those of `functional` on lists of matrices, a launch each.

`functional` is the reference, and what runs wherever Triton does not. Here a gradient or a weight is read once by each
operation and a weight is written once, whatever its memory layout; no tensor of the weight's size is made.

What a launch compiles in: dtypes, which strides are 1, the rank and the block sizes. What stays live: addresses and
seeds, which come in one int64 tensor a launch, and numbers such as the learning rate. Kernels that write in place are
not autotuned, which would run them several times on the live tensors. Blocks are counted along the first axis of a
grid, since CUDA takes 65,535 at most along the others.

Products are taken on tensor cores, with errors that do not show. G Q goes into moments that are kept for long: a
half-precision gradient is exact there, and meets the sum of two matrices of its own dtype (relative error 2^-16 in
bf16). The low-rank update of a bf16 weight is one product in bf16: its error, 2^-8 of the update, is as large as the
rounding of the gradient that it was made of, and far below that of the weight. What is fp32 takes three in TF32.
So does X of a whole moment (see `whole`), which beside a half-precision gradient is a bf16 in both passes: what it is
rounded by moves the weight once, and the moment keeps nothing of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import functional as F
from .tiles import dot, draws, halves, looked_ahead, read_moment, rounded, rounded_by, write_moment
from .whole import Whole

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OF_MOMENTS = {  # how a moment is kept, by the dtype of its values
    torch.float32: ("float", tl.float32),
    torch.bfloat16: ("float", tl.bfloat16),
    torch.int8: ("int8", tl.int8),
    torch.uint8: ("int4", tl.uint8),
}


@triton.jit
def _project_kernel(
    table, R, norms, long, short, rank, beta, ahead, g_row, g_col, q_row, q_col, m_row, s_row,
    G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, IS_RANGE: tl.constexpr,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, IS_TURNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    WIDTH: tl.constexpr = 2 if MOMENT == "none" else 4
    G = tl.load(table + WIDTH * matrix).to(tl.pointer_type(G_DTYPE))
    first = tl.load(table + WIDTH * matrix + 1)
    Q = first.to(tl.pointer_type(Q_DTYPE))
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    product = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_L,), tl.float32)
    if MOMENT != "none":
        values = tl.load(table + WIDTH * matrix + 2).to(tl.pointer_type(M_DTYPE))
        scales = tl.load(table + WIDTH * matrix + 3).to(tl.pointer_type(tl.bfloat16))
        squares_of_g = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, short, BLOCK_S):
        inner = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        is_g = (rows[:, None] < long) & (inner[None, :] < short)
        g = tl.load(G + rows[:, None] * g_row + inner[None, :] * g_col, mask=is_g, other=0.0)
        wide = g.to(tl.float32)
        if MOMENT != "none":
            squares_of_g += tl.sum(wide * wide, axis=1)
            m = read_moment(
                values, scales, tl.program_id(0) * BLOCK_L, start, long, short, m_row, s_row,
                MOMENT, IS_TURNED, BLOCK_L, BLOCK_S,
            )  # fmt: skip
            wide = looked_ahead(m, wide, beta, ahead, G_DTYPE, INTERPRETED)
        squares += tl.sum(wide * wide, axis=1)
        if IS_RANGE:
            within = inner - first
            chosen = is_g & (within[None, :] >= 0) & (within[None, :] < rank)
            tl.store(R + (matrix * long + rows)[:, None] * rank + within[None, :], wide, mask=chosen)
        else:
            is_q = (inner[:, None] < short) & (columns[None, :] < rank)
            q = tl.load(Q + inner[:, None] * q_row + columns[None, :] * q_col, mask=is_q, other=0.0).to(tl.float32)
            if tl.float32 == G_DTYPE:
                product = tl.dot(g if MOMENT == "none" else wide, q, product, input_precision="tf32x3")
            else:
                X_DTYPE: tl.constexpr = G_DTYPE if MOMENT == "none" else tl.bfloat16
                x = g if MOMENT == "none" else wide.to(tl.bfloat16)
                high, low = halves(q, X_DTYPE, INTERPRETED)
                product = dot(x, high, product, INTERPRETED)
                product = dot(x, low, product, INTERPRETED)
    place = matrix * long + rows
    if not IS_RANGE:
        inside = (rows[:, None] < long) & (columns[None, :] < rank)
        tl.store(R + place[:, None] * rank + columns[None, :], product, mask=inside)
    if MOMENT == "none":
        tl.store(norms + place, tl.sqrt(squares), mask=rows < long)
    else:
        tl.store(norms + 2 * place, tl.sqrt(squares), mask=rows < long)
        tl.store(norms + 2 * place + 1, tl.sqrt(squares_of_g), mask=rows < long)


@triton.jit
def _direction_kernel(
    table, R, N, R_norms, N_norms, active, long, rank, b1, b2, c1, c2, eps,
    DTYPE: tl.constexpr, AT_RANDOM: tl.constexpr, BASE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    on = tl.load(active + matrix).to(tl.int32) + tl.zeros((BLOCK_L, BLOCK_R), tl.int32) != 0
    M = tl.load(table + 4 * matrix).to(tl.pointer_type(DTYPE))
    V = tl.load(table + 4 * matrix + 1).to(tl.pointer_type(DTYPE))
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < long) & (columns[None, :] < rank) & on
    own = rows[:, None] * rank + columns[None, :]
    place = matrix * long + rows
    r = tl.load(R + place[:, None] * rank + columns[None, :], mask=inside, other=0.0)
    m = tl.load(M + own, mask=inside, other=0.0).to(tl.float32)
    if BASE == "muon":  # what is yet to be orthogonalized
        m = b1 * m + c1 * r
        n = b1 * m + c1 * r
    elif BASE == "lion":
        mixed = b1 * m + c1 * r
        n = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
        m = b2 * m + c2 * r
    else:
        v = tl.load(V + own, mask=inside, other=0.0).to(tl.float32)
        m = b1 * m + c1 * r
        v = b2 * v + c2 * r * r
        n = tl.where(inside, m / (tl.sqrt(v) + eps), 0.0)
        tl.store(V + own, rounded(v, tl.load(table + 4 * matrix + 3), own, DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
    tl.store(M + own, rounded(m, tl.load(table + 4 * matrix + 2), own, DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
    written = (rows[:, None] < long) & (columns[None, :] < rank)
    tl.store(N + place[:, None] * rank + columns[None, :], n, mask=written)
    tl.store(R_norms + place, tl.sqrt(tl.sum(r * r, axis=1)), mask=rows < long)
    tl.store(N_norms + place, tl.sqrt(tl.sum(n * n, axis=1)), mask=rows < long)


@triton.jit
def _update_kernel(
    table, N, R, a, B, active, long, short, rank, k, decay, beta, ahead, share,
    w_row, w_col, g_row, g_col, q_row, q_col, m_row, s_row,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, HAS_R: tl.constexpr, HAS_B: tl.constexpr,
    IS_RANGE: tl.constexpr, AT_RANDOM: tl.constexpr,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, IS_TURNED: tl.constexpr, M_AT_RANDOM: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    WIDTH: tl.constexpr = 4 if MOMENT == "none" else 7
    if tl.load(active + matrix) != 0:
        W = tl.load(table + WIDTH * matrix).to(tl.pointer_type(W_DTYPE))
        G = tl.load(table + WIDTH * matrix + 1).to(tl.pointer_type(G_DTYPE))
        first = tl.load(table + WIDTH * matrix + 2)
        Q = first.to(tl.pointer_type(Q_DTYPE))
        rows = (tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        columns = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
        place = matrix * long + rows
        if HAS_B:
            b = tl.load(B + place, mask=rows < long, other=0.0)
        scale = tl.load(a + matrix)
        product = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
        if IS_RANGE:
            within = columns - first
            chosen = (rows[:, None] < long) & (within[None, :] >= 0) & (within[None, :] < rank)
            product = scale * tl.load(N + place[:, None] * rank + within[None, :], mask=chosen, other=0.0)
            if HAS_R:
                part = tl.load(R + place[:, None] * rank + within[None, :], mask=chosen, other=0.0)
                product -= (k * b)[:, None] * part
        for start in range(0, 0 if IS_RANGE else rank, BLOCK_R):
            inner = start + tl.arange(0, BLOCK_R)
            is_low_rank = (rows[:, None] < long) & (inner[None, :] < rank)
            n = scale * tl.load(N + place[:, None] * rank + inner[None, :], mask=is_low_rank, other=0.0)
            if HAS_R:
                r = tl.load(R + place[:, None] * rank + inner[None, :], mask=is_low_rank, other=0.0)
                n -= (k * b)[:, None] * r
            is_q = (inner[:, None] < rank) & (columns[None, :] < short)
            q = tl.load(Q + columns[None, :] * q_row + inner[:, None] * q_col, mask=is_q, other=0.0).to(tl.float32)
            if tl.float32 == W_DTYPE:
                product = tl.dot(n, q, product, input_precision="tf32x3")
            elif tl.bfloat16 == W_DTYPE:
                n_rounded = rounded(n, 0, 0, tl.bfloat16, False, INTERPRETED)
                q_rounded = rounded(q, 0, 0, tl.bfloat16, False, INTERPRETED)
                product = dot(n_rounded, q_rounded, product, INTERPRETED)
            else:
                n_high, n_low = halves(n, tl.bfloat16, INTERPRETED)
                q_high, q_low = halves(q, tl.bfloat16, INTERPRETED)
                product = dot(n_high, q_high, product, INTERPRETED)
                product = dot(n_high, q_low, product, INTERPRETED)
                product = dot(n_low, q_high, product, INTERPRETED)
        inside = (rows[:, None] < long) & (columns[None, :] < short)
        of_w = rows[:, None] * w_row + columns[None, :] * w_col
        w = tl.load(W + of_w, mask=inside, other=0.0).to(tl.float32) - product
        if HAS_B:
            g = tl.load(G + rows[:, None] * g_row + columns[None, :] * g_col, mask=inside, other=0.0).to(tl.float32)
            x = g
            if MOMENT != "none":
                first_row, first_column = tl.program_id(1) * BLOCK_L, tl.program_id(0) * BLOCK_S
                values = tl.load(table + WIDTH * matrix + 4).to(tl.pointer_type(M_DTYPE))
                scales = tl.load(table + WIDTH * matrix + 5).to(tl.pointer_type(tl.bfloat16))
                m = read_moment(
                    values, scales, first_row, first_column, long, short, m_row, s_row,
                    MOMENT, IS_TURNED, BLOCK_L, BLOCK_S,
                )  # fmt: skip
                x = looked_ahead(m, g, beta, ahead, G_DTYPE, INTERPRETED)
            w -= b[:, None] * x
        w *= decay
        if MOMENT == "none":
            own = rows[:, None] * short + columns[None, :]
            seed = tl.load(table + WIDTH * matrix + 3)
            tl.store(W + of_w, rounded(w, seed, own, W_DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
        else:
            # The draws cost more than all else: of each, one half rounds the weight and the other the moment.
            noise = tl.zeros((BLOCK_L, BLOCK_S), tl.uint32)
            if AT_RANDOM or M_AT_RANDOM:
                seed = tl.load(table + WIDTH * matrix + (3 if AT_RANDOM else 6))
                noise = draws(seed, first_row, first_column, short, BLOCK_L, BLOCK_S)
            tl.store(W + of_w, rounded_by(w, noise & 0xFFFF, W_DTYPE, AT_RANDOM, INTERPRETED), mask=inside)
            write_moment(
                beta * m + share * g, noise >> 16, values, scales, first_row, first_column, long, short,
                m_row, s_row, MOMENT, M_DTYPE, IS_TURNED, M_AT_RANDOM, INTERPRETED, BLOCK_L, BLOCK_S,
            )  # fmt: skip


@triton.jit
def _adamw_kernel(
    table, corrections1, corrections2, finite, size, lr, b1, b2, c1, c2, eps, decay,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr,
    ROUNDS_W: tl.constexpr, ROUNDS_M: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(1).to(tl.int64)
    if tl.load(finite) != 0:
        W = tl.load(table + 7 * weight).to(tl.pointer_type(W_DTYPE))
        G = tl.load(table + 7 * weight + 1).to(tl.pointer_type(G_DTYPE))
        M = tl.load(table + 7 * weight + 2).to(tl.pointer_type(M_DTYPE))
        V = tl.load(table + 7 * weight + 3).to(tl.pointer_type(M_DTYPE))
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(G + i, mask=i < size, other=0.0).to(tl.float32)
        w = tl.load(W + i, mask=i < size, other=0.0).to(tl.float32)
        m = b1 * tl.load(M + i, mask=i < size, other=0.0).to(tl.float32) + c1 * g
        v = b2 * tl.load(V + i, mask=i < size, other=0.0).to(tl.float32) + c2 * g * g
        step = lr / tl.load(corrections1 + weight)
        w = decay * w - step * m / (tl.sqrt(v) / tl.sqrt(tl.load(corrections2 + weight)) + eps)
        tl.store(W + i, rounded(w, tl.load(table + 7 * weight + 4), i, W_DTYPE, ROUNDS_W, INTERPRETED), mask=i < size)
        tl.store(M + i, rounded(m, tl.load(table + 7 * weight + 5), i, M_DTYPE, ROUNDS_M, INTERPRETED), mask=i < size)
        tl.store(V + i, rounded(v, tl.load(table + 7 * weight + 6), i, M_DTYPE, ROUNDS_M, INTERPRETED), mask=i < size)


INTERPRETED = isinstance(_project_kernel, InterpretedFunction)


def _table(*columns: Sequence[Any]) -> Tensor:
    """(matrices, columns) int64 on the device: addresses of tensors, first ones of ranges, and numbers."""
    rows = [[_number(x) for x in row] for row in zip(*columns, strict=True)]
    device = next(x.device for column in columns for x in column if isinstance(x, Tensor))
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _number(x: Any) -> int:
    number: int = x.data_ptr() if isinstance(x, Tensor) else x.start if isinstance(x, range) else x
    return number


def _about(Q: F.Basis) -> tuple[int, int, Any, bool]:
    """What a kernel is told of a basis: two strides, the dtype, and whether it is a range of columns."""
    return (0, 0, tl.float32, True) if isinstance(Q, range) else (*Q.stride(), DTYPES[Q.dtype], False)


def _ranges_within(bases: Sequence[F.Basis], short: int) -> list[range]:
    """The bases, if all are ranges of columns of which none lies outside."""
    ranges = [Q for Q in bases if isinstance(Q, range) and Q.start >= 0 and Q.stop <= short]
    return ranges if len(ranges) == len(bases) else []


def _power_of_2(size: int, least: int, most: int) -> int:
    return int(min(most, max(least, triton.next_power_of_2(size))))


def _about_moments(moments: Sequence[Whole] | None) -> tuple[tuple[int, int], dict[str, Any]]:
    """What a kernel is told of moments: the strides of rows of values and scales, and what it compiles in."""
    if moments is None:
        return (0, 0), {"MOMENT": "none", "M_DTYPE": tl.float32, "IS_TURNED": False}
    values, scales = moments[0].values, moments[0].scales
    kind, dtype = OF_MOMENTS[values.dtype]
    strides = (values.stride(0), 0 if scales is None else scales.stride(0))
    return strides, {"MOMENT": kind, "M_DTYPE": dtype, "IS_TURNED": moments[0].is_turned}


def _addresses(moments: Sequence[Whole] | None) -> tuple[list[Any], ...]:
    """Columns of a table: values and scales; none without moments."""
    if moments is None:
        return ()
    return [M.values for M in moments], [0 if M.scales is None else M.scales for M in moments]


def project(grads: Sequence[Tensor], bases: Sequence[F.Basis]) -> tuple[Tensor, Tensor]:
    """See `functional.project`. One pass over G for up to 256 columns of Q (fp32: 128), or for a range."""
    return _project(grads, bases)


def project_moments(
    grads: Sequence[Tensor], moments: Sequence[Whole], bases: Sequence[Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """See `whole.project`. One pass over gradient and moment, as `project` makes one over the gradient."""
    return _project(grads, bases, moments, beta)


def _project(
    grads: Sequence[Tensor], bases: Sequence[F.Basis], moments: Sequence[Whole] | None = None, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    (long, short), rank = grads[0].shape, F.rank_of(bases[0])
    *strides, q_dtype, is_range = _about(bases[0])
    is_filled = not is_range or bool(_ranges_within(bases, short))
    R = (torch.empty if is_filled else torch.zeros)(len(grads), long, rank, device=grads[0].device)
    norms = R.new_empty(len(grads), long, 1 if moments is None else 2)
    of_moments, compiled = _about_moments(moments)
    # No spilled registers and less than 99 KiB of shared memory, by what ptxas says for compute capabilities 8 and 9.
    is_half, is_plain = grads[0].dtype != torch.float32, moments is None
    block_r = 16 if is_range else _power_of_2(rank, 16, 256 if is_half else 128)
    block_l = 64 if block_r <= (128 if is_half else 64 if is_plain else 32) else 32
    if long:
        _project_kernel[triton.cdiv(long, block_l), 1 if is_range else triton.cdiv(rank, block_r), len(grads)](
            _table(grads, bases, *_addresses(moments)), R, norms, long, short, rank, beta, 1 - beta**2,
            *grads[0].stride(), *strides, *of_moments,
            G_DTYPE=DTYPES[grads[0].dtype], Q_DTYPE=q_dtype, IS_RANGE=is_range, **compiled, INTERPRETED=INTERPRETED,
            BLOCK_L=block_l, BLOCK_S=32, BLOCK_R=block_r,
            num_warps=4 if is_half and is_plain and block_r <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return R, norms


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
    block_r = _power_of_2(rank, 1, rank * 2)
    block_l = max(1, 2**11 // block_r)
    if long:
        none = [0] * count
        _direction_kernel[triton.cdiv(long, block_l), count](
            _table(M, V, seeds[0] if seeds else none, seeds[-1] if seeds else none),
            R, N, R_norms, N_norms, active, long, rank, *betas, *(1 - b for b in betas), eps,
            DTYPE=DTYPES[M[0].dtype], AT_RANDOM=seeds is not None and M[0].dtype == torch.bfloat16,
            BASE=base_optimizer, INTERPRETED=INTERPRETED, BLOCK_L=block_l, BLOCK_R=block_r,
        )  # fmt: skip
    if base_optimizer == "muon":
        N = F.orthogonalized(N, add)
        N_norms = F.row_norms(N)
    return N, R_norms, N_norms


def apply_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    N: Tensor,
    R: Tensor | None,
    a: Tensor,
    k: float,
    B: Tensor | None,
    bases: Sequence[F.Basis],
    decay: float,
    active: Tensor,
    seeds: Sequence[int] | None = None,
) -> None:
    """See `functional.apply_updates`. One pass over W and G, the product with Q^T included."""
    _apply_updates(weights, grads, N, R, a, k, B, bases, decay, active, seeds)


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
    a = torch.ones(len(A), device=A.device)
    of_moments = (moments, beta, moment_seeds)
    _apply_updates(weights, grads, A, None, a, 0.0, B, bases, decay, active, seeds, *of_moments)


def _apply_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    N: Tensor,
    R: Tensor | None,
    a: Tensor,
    k: float,
    B: Tensor | None,
    bases: Sequence[F.Basis],
    decay: float,
    active: Tensor,
    seeds: Sequence[int] | None,
    moments: Sequence[Whole] | None = None,
    beta: float = 0.0,
    moment_seeds: Sequence[int] | None = None,
) -> None:
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
    block_s = 64 if weights[0].dtype != torch.float32 or moments is not None else 128
    *strides, q_dtype, is_range = _about(bases[0])
    none = [0] * count
    of_moments, compiled = _about_moments(moments)
    addresses = () if moments is None else (*_addresses(moments), moment_seeds or none)
    _update_kernel[triton.cdiv(short, block_s), triton.cdiv(long, 64), count](
        _table(weights, grads, bases, seeds or none, *addresses),
        N, N if R is None else R, a, N if B is None else B, active,
        long, short, rank, k, decay, beta, 1 - beta**2, 1 - beta,
        *weights[0].stride(), *grads[0].stride(), *strides, *of_moments,
        W_DTYPE=DTYPES[weights[0].dtype], G_DTYPE=DTYPES[grads[0].dtype], Q_DTYPE=q_dtype,
        HAS_R=R is not None, HAS_B=B is not None, IS_RANGE=is_range, AT_RANDOM=seeds is not None,
        **compiled, M_AT_RANDOM=moment_seeds is not None and compiled["M_DTYPE"] != tl.float32,
        INTERPRETED=INTERPRETED, BLOCK_L=64, BLOCK_S=block_s, BLOCK_R=32, num_warps=8, num_stages=2,
    )  # fmt: skip


def dense_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    counts: Sequence[Tensor],
    finite: Tensor,
    weight_seeds: Sequence[int | None],
    state_seeds: Sequence[int | None],
    settings: dict[str, Any],
) -> None:
    """See `functional.dense_adamw`. Weights that are not fp32 throughout: one launch for all of a size."""
    alike: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)
    columns = (weights, grads, exp_avgs, exp_avg_sqs, counts, weight_seeds, state_seeds)
    for item in zip(*columns, strict=True):
        tensors = item[:4]
        kind = tuple((x.dtype, x.stride()) for x in tensors)
        is_fp32 = all(x.dtype == torch.float32 for x in tensors)
        # Memory is gone through from end to end, so it must be without gaps, and alike in all four.
        is_dense = len({x.stride() for x in tensors}) == 1 and _has_no_gaps(tensors[0])
        rounds = tuple(seed is not None for seed in item[5:])
        alike[None if is_fp32 or not is_dense else (item[0].numel(), kind, rounds)].append(item)
    for key, items in alike.items():
        W, G, M, V, steps, w_seeds, m_seeds = (list(column) for column in zip(*items, strict=True))
        if key is None:
            F.dense_adamw(W, G, M, V, steps, finite, w_seeds, m_seeds, settings)
            continue
        b1, b2 = settings["betas"]
        t = torch.stack(steps) + 1
        size = W[0].numel()
        seeds = [[seed or 0 for seed in of] for of in (w_seeds, m_seeds)]
        second = [seed + 1 for seed in seeds[1]]  # the two moments of a weight are drawn apart
        if size:
            _adamw_kernel[triton.cdiv(size, 1024), len(W)](
                _table(W, G, M, V, *seeds, second),
                F.bias_correction(b1, t), F.bias_correction(b2, t), finite, size, settings["lr"], b1, b2,
                1 - b1, 1 - b2, settings["eps"], 1 - settings["lr"] * settings["weight_decay"],
                W_DTYPE=DTYPES[W[0].dtype], G_DTYPE=DTYPES[G[0].dtype], M_DTYPE=DTYPES[M[0].dtype],
                ROUNDS_W=w_seeds[0] is not None, ROUNDS_M=m_seeds[0] is not None and M[0].dtype == torch.bfloat16,
                INTERPRETED=INTERPRETED, BLOCK=1024,
            )  # fmt: skip


def _has_no_gaps(tensor: Tensor) -> bool:
    sides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, length in sides:
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
