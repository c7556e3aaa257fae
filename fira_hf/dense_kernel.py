"""AdamW of what is not projected, in Triton: one launch for all weights of a size, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import functional as F
from .factors import DTYPES, are_aligned, cdiv, table_of
from .tiles import INTERPRETED, draws, pointer, rounded, rounded_by


@triton.jit
def _adamw_kernel(
    table, corrections1, corrections2, finite, size, lr, b1, b2, c1, c2, eps, decay,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ROUNDS_W: tl.constexpr, ROUNDS_M: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(1).to(tl.int64)
    if tl.load(finite) != 0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        W = pointer(table + 6 * weight, W_DTYPE, ALIGNED) + first
        G = pointer(table + 6 * weight + 1, G_DTYPE, ALIGNED) + first
        M = pointer(table + 6 * weight + 2, M_DTYPE, ALIGNED) + first
        V = pointer(table + 6 * weight + 3, M_DTYPE, ALIGNED) + first
        i = tl.arange(0, BLOCK)
        inside = i < size - first
        g = tl.load(G + i, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(W + i, mask=inside, other=0.0).to(tl.float32)
        m = b1 * tl.load(M + i, mask=inside, other=0.0).to(tl.float32) + c1 * g
        v = b2 * tl.load(V + i, mask=inside, other=0.0).to(tl.float32) + c2 * g * g
        step = lr / tl.load(corrections1 + weight)
        root = 1 / tl.sqrt(tl.load(corrections2 + weight))
        w = decay * w - step * m / (tl.sqrt(v) * root + eps)
        tl.store(
            W + i, rounded(w, tl.load(table + 6 * weight + 4), first + i, W_DTYPE, ROUNDS_W, INTERPRETED), mask=inside
        )
        noise = tl.zeros((BLOCK,), tl.uint32)
        if ROUNDS_M:  # of each draw, one half rounds one moment and the other the other
            noise = draws(tl.load(table + 6 * weight + 5), first + i)
        tl.store(M + i, rounded_by(m, noise >> 16, M_DTYPE, ROUNDS_M, INTERPRETED), mask=inside)
        tl.store(V + i, rounded_by(v, noise & 0xFFFF, M_DTYPE, ROUNDS_M, INTERPRETED), mask=inside)


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
        if size:
            _adamw_kernel[cdiv(size, 1024), len(W)](
                table_of(W, G, M, V, *seeds),
                F.bias_correction(b1, t), F.bias_correction(b2, t), finite, size, settings["lr"], b1, b2,
                1 - b1, 1 - b2, settings["eps"], 1 - settings["lr"] * settings["weight_decay"],
                W_DTYPE=DTYPES[W[0].dtype], G_DTYPE=DTYPES[G[0].dtype], M_DTYPE=DTYPES[M[0].dtype],
                ALIGNED=are_aligned(W, G, M, V), ROUNDS_W=w_seeds[0] is not None,
                ROUNDS_M=m_seeds[0] is not None and M[0].dtype == torch.bfloat16,
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
