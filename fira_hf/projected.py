"""One step of projected matrices: reads their state, has `functional` or its kernels compute, and writes it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import base_optimizers, int8, whole
from . import functional as F
from .codes import negligible
from .matrices import Matrix, operations, operations_of_moments, read, update_moments, updates_of_int8
from .state import OF_MOMENTS, has_basis, is_whole, rounds_state, rounds_weight

Watch = Callable[..., None] | None


def step_projected(matrices: list[Matrix], group: dict[str, Any], watch: Watch = None) -> None:
    """One step of matrices of one shape and dtype, which have begun; what is low-rank is stacked along a first
    dimension. `watch` is given ||G||, ||R||, ||alpha N||, the residual's norm and its factor c, all (B, 1, 1), and
    which matrices are active."""
    shards = matrices[0].shards
    add = shards.add if shards else None
    ops = operations(matrices[0].parameter)
    grads = [matrix.tall(matrix.grad) for matrix in matrices]
    long, short = max(matrices[0].shape), min(matrices[0].shape)
    bases: Any = read(matrices, "basis") if has_basis(group, short) else [m.columns(group) for m in matrices]
    if shards:
        bases = [shards.own_columns(Q, short) for Q in bases]
    wholes = [matrix.whole_moment(group) for matrix in matrices] if is_whole(group) else []
    # The row norms are those of G; for a whole moment of X and G, of which X is to the step what G is elsewhere.
    if wholes:
        project, apply_updates = operations_of_moments(ops)
        R, norms = project(grads, wholes, bases, group["betas"][0])
    else:
        R, norms = ops.project(grads, bases)
    if shards:
        R, norms = shards.collect(R, norms)

    is_watched_by_host = matrices[0].parameter.device.type == "cpu"
    if is_watched_by_host:
        # Here a look at the gradients costs nothing. Elsewhere the device decides by itself.
        keep = F.are_usable(norms[..., -1:], add).nonzero().flatten().tolist()
        if not keep:
            return
        if len(keep) < len(matrices):
            R, norms = R[keep], norms[keep]
            matrices, grads, bases = ([x[i] for i in keep] for x in (matrices, grads, bases))
            wholes = [wholes[i] for i in keep] if wholes else []
    for matrix in matrices:
        matrix.refresh_in = max(0, (matrix.refresh_in or 0) - 1)
    base, lr = group["base_optimizer"], group["lr"]
    is_corrected = group["correct_bias"] and base in ("adamw", "adafactor")
    if group["adjust_lr"] == "match_rms_adamw":
        lr = lr * base_optimizers.rms_scale(base, long, short, R.shape[2])
    steps, betas = [matrix["step"] for matrix in matrices], group["betas"] if is_corrected else None
    active: Tensor | None = None
    if is_watched_by_host:
        torch._foreach_add_(steps, 1.0)
        eta = F.step_sizes(steps, lr, betas)
    else:
        active, eta = ops.advance(norms, steps, lr, betas, add)
    histories, settings = [matrix["residual_norm"] for matrix in matrices], _scales(group, matrices[0].state)
    if wholes:
        if active is not None:
            R, norms = (torch.where(active.view(-1, 1, 1), x, 0.0) for x in (R, norms))
        N = base_optimizers.orthogonalized(R, add)
        R_norms, N_norms = F.row_norms(R), F.row_norms(N)
        equal = whole.equal_rows(N_norms, long, R.shape[2])
        N_norms = equal * N_norms
        phi, norm = whole.row_scale(norms[..., :1], R_norms, long, short, R.shape[2], settings.negligible, add)
        a, B, *limited = F.limited_scales(phi, norm, eta, histories, settings, active)
    else:
        N, R_norms, N_norms = update_moments(matrices, group, R, active, add)
        a, B, *limited = ops.scales(norms, R_norms, N_norms, eta, histories, settings, active, add)

    k = settings.k
    low_rank: tuple[Tensor, Tensor | None] = (N, R)
    if shards or wholes:
        A = N.mul_(equal * a if wholes else a).addcmul_(B, R, value=-k)
        A, B = shards.spread(A, B, long) if shards else (A, B)
        low_rank, a = (A, None), torch.ones_like(eta)
    views = [matrix.tall(matrix.weight) for matrix in matrices]
    decay = 1 - group["lr"] * group["weight_decay"]
    is_rounded = rounds_weight(matrices[0].parameter, group)
    weight_seeds = [matrix.rounding_seed() for matrix in matrices] if is_rounded else None
    if wholes:
        moment_seeds = [matrix.rounding_seed(OF_MOMENTS) for matrix in matrices] if rounds_state(group) else None
        both = (weight_seeds, moment_seeds)
        apply_updates(views, grads, wholes, A, B, bases, decay, group["betas"][0], active, *both)
    else:
        b = B if settings.s else None
        apply_updates = updates_of_int8(ops) if isinstance(views[0], int8.Int8Weight) else ops.apply_updates
        apply_updates(views, grads, *low_rank, a, k, b, bases, decay, active, weight_seeds)
    if watch is not None:
        each = torch.stack([norms[..., :1], R_norms, group["alpha"] * N_norms])
        each = each if active is None else torch.where(active.view(-1, 1, 1), each, 0.0)
        watch(*F.total_norms(each, add), *limited, active)


def _scales(group: dict[str, Any], state: dict[str, Any]) -> F.Scales:
    alpha = group["alpha"]
    s, k = {"reference": (1.0, alpha), "paper": (alpha, 1.0), "none": (0.0, 1.0), "moment": (alpha, 1.0)}[
        group["residual"]
    ]
    return F.Scales(alpha, s, k, group["scaling"], group["gamma"], group["limiter"], negligible(state))
