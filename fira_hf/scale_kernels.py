"""What a step decides between its two passes, in Triton: two launches where torch would make some forty.

A program has one matrix. Its work is small, and starting it is what it costs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import functional as F
from .factors import power_of_2, table_of

EPS = tl.constexpr(F.EPS)
BLOCK = 4096  # rows that are taken together
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _advance_kernel(
    table, norms, active, eta, long, width, lr, log_b1, log_b2, IS_CORRECTED: tl.constexpr, BLOCK: tl.constexpr
):
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    norms += (matrix * long + 1) * width - 1  # the last of a row's
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, long, BLOCK):
        g = tl.load(norms + (start + i).to(tl.int64) * width, mask=i < long - start, other=0.0)
        squares += g * g
    whole = tl.sum(squares, axis=0)
    on = (whole > 0) & (whole <= LARGEST)  # False for NaN, too
    count = tl.load(table + matrix).to(tl.pointer_type(tl.float32))
    t = tl.load(count) + on.to(tl.float32)
    tl.store(count, t)
    size = lr
    if IS_CORRECTED:
        # In fp64, of which 1 - b^t loses no digit that is wanted.
        of_1 = 1 - tl.exp(t.to(tl.float64) * log_b1)
        of_2 = 1 - tl.exp(t.to(tl.float64) * log_b2)
        size = (lr * tl.sqrt(of_2) / of_1).to(tl.float32)
    tl.store(active + matrix, on.to(tl.uint8))
    tl.store(eta + matrix, tl.where(on, size, 0.0))


@triton.jit
def _scales_kernel(
    table, G_norms, R_norms, N_norms, eta, active, a, B, limited, long, alpha, s, removed, gamma, negligible,
    SCALING: tl.constexpr, LIMITER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    on = tl.load(active + matrix) != 0
    read = tl.where(on, long, 0)  # of a gradient with NaN nothing
    size = tl.load(eta + matrix)
    i = tl.arange(0, BLOCK)
    G_norms += matrix * long
    R_norms += matrix * long
    N_norms += matrix * long
    of_all = 1.0
    if SCALING == "matrix":
        of_r, of_n = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, long, BLOCK):
            r = tl.load(R_norms + start + i, mask=i < long - start, other=0.0)
            n = tl.load(N_norms + start + i, mask=i < long - start, other=0.0)
            of_r += r * r
            of_n += n * n
        of_all = tl.sqrt(tl.sum(of_n, axis=0)) / (tl.sqrt(tl.sum(of_r, axis=0)) + EPS)
    of_residual, of_gradient = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, long, BLOCK):
        is_row = i < read - start
        g = tl.load(G_norms + start + i, mask=is_row, other=0.0)
        r = tl.load(R_norms + start + i, mask=is_row, other=0.0)
        phi = of_all
        if SCALING == "column":
            phi = tl.load(N_norms + start + i, mask=is_row, other=0.0) / (r + EPS)
        left = phi * tl.sqrt(tl.maximum(g * g - removed * (r * r), 0.0))
        of_residual += left * left
        of_gradient += phi * g * (phi * g)
    norm = tl.sqrt(tl.sum(of_residual, axis=0))
    norm = tl.where(norm > negligible * tl.sqrt(tl.sum(of_gradient, axis=0)), norm, float("inf"))
    history = tl.load(table + matrix).to(tl.pointer_type(tl.float32))
    previous = tl.load(history)
    c = 1.0
    if LIMITER == "scale":
        c = gamma
    elif LIMITER == "shrink":
        c = gamma + (1 - gamma) * previous / norm
        c = tl.where((norm <= LARGEST) & (previous <= LARGEST) & (norm > 0), c, 1.0)
    elif LIMITER == "growth":
        c = tl.where(norm <= LARGEST, tl.minimum(gamma * (previous + EPS) / norm, 1.0), 1.0)
    tl.store(history, tl.where(on, c * norm, previous))
    tl.store(a + matrix, alpha * size)
    tl.store(limited + 2 * matrix, s * c * norm)
    tl.store(limited + 2 * matrix + 1, c)
    for start in range(0, long, BLOCK):
        is_row = i < long - start
        phi = of_all
        if SCALING == "column":
            r = tl.load(R_norms + start + i, mask=is_row, other=0.0)
            phi = tl.load(N_norms + start + i, mask=is_row, other=0.0) / (r + EPS)
        tl.store(B + matrix * long + start + i, phi * (s * c * size), mask=is_row)


def advance(
    norms: Tensor, steps: list[Tensor], lr: float, betas: tuple[float, float] | None, add: F.Add = None
) -> tuple[Tensor, Tensor]:
    """See `functional.advance`."""
    if add is not None:
        return F.advance(norms, steps, lr, betas, add)
    count, long, width = norms.shape
    active, eta = torch.empty(count, dtype=torch.uint8, device=norms.device), norms.new_empty(count, 1, 1)
    logs, block = [math.log(beta) if beta else -math.inf for beta in betas or (0.0, 0.0)], _block(long)
    _advance_kernel[count,](
        table_of(steps), norms, active, eta, long, width, lr, *logs, IS_CORRECTED=betas is not None, BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return active.view(torch.bool), eta


def scales(
    G_norms: Tensor,
    R_norms: Tensor,
    N_norms: Tensor,
    eta: Tensor,
    histories: list[Tensor],
    settings: F.Scales,
    active: Tensor,
    add: F.Add = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `functional.scales`."""
    if add is not None:
        return F.scales(G_norms, R_norms, N_norms, eta, histories, settings, active, add)
    count, long, _ = R_norms.shape
    a, B, limited = torch.empty_like(eta), torch.empty_like(R_norms), eta.new_empty(count, 2)
    block = _block(long)
    _scales_kernel[count,](
        table_of(histories), G_norms, R_norms, N_norms, eta, active, a, B, limited, long,
        settings.alpha, settings.s, settings.k * (2 - settings.k), settings.gamma or 0.0, settings.negligible,
        SCALING=settings.scaling, LIMITER="none" if settings.gamma is None else settings.limiter, BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    residual, c = limited.view(count, 2, 1, 1).unbind(1)
    return a, B, residual, c


def _block(long: int) -> int:
    return power_of_2(long, most=BLOCK)
