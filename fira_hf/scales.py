"""What a step decides from norms of rows alone: which gradients are usable, the size of an update, and how the
residual is scaled and limited. Letters, shapes and sources: as in `functional`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_optimizers import Add

# The epsilon of phi and of the limiter in the published code (fira 1.0.2, fira_adamw.py).
EPS = 1e-8
# A residual below a thousandth of the scaled gradient is rounding noise of the closed form in fp32 (the square is
# known to about 1e-7 of the gradient's). As a reference for growth it would switch the residual off for a thousand
# steps, so it does not count as history.
NEGLIGIBLE = 1e-3


def total_norms(norms: Tensor, add: Add = None) -> Tensor:
    """Norm of each matrix from the norms of its rows: (..., rows, 1) -> (..., 1, 1)."""
    if add is None:
        return torch.linalg.vector_norm(norms, dim=-2, keepdim=True)
    return add(norms.square().sum(-2, keepdim=True)).sqrt_()


def are_usable(norms: Tensor, add: Add = None) -> Tensor:
    """(B,) bool from row norms (B, long, 1): gradients that are finite (their square in fp32, too) and not zero."""
    whole = total_norms(norms, add).flatten()
    return (whole > 0) & (whole.square() < torch.inf)  # False for NaN, too


def residual_scale(N_norms: Tensor, R_norms: Tensor, scaling: str, add: Add = None) -> Tensor:
    """phi, (B, long, 1), from the row norms of N and R: one a row ("column"), one a matrix, or 1 ("none")."""
    if scaling == "none":
        return torch.ones_like(R_norms)
    if scaling == "matrix":
        N_norms, R_norms = total_norms(torch.stack([N_norms, R_norms]), add).expand(2, *R_norms.shape)
    return N_norms / (R_norms + EPS)


def residual_norm(
    phi: Tensor, G_norms: Tensor, R_norms: Tensor, k: float, add: Add = None, negligible: float = NEGLIGIBLE
) -> Tensor:
    """||S|| of S = phi (G - k R Q^T) in closed form, (B, 1, 1); infinite where S is negligible beside phi G.

    phi, G_norms, R_norms: (B, long, 1). The subtraction can come out below zero where nearly all of G lies in the
    subspace and k = 1; it is clamped.
    """
    left = (G_norms.square() - k * (2 - k) * R_norms.square()).clamp_(min=0).sqrt_()
    norm, whole = total_norms(torch.stack([phi * left, phi * G_norms]), add)
    return torch.where(norm > negligible * whole, norm, torch.inf)


def limit(norm: Tensor, previous: Tensor, gamma: float | None, limiter: str = "growth") -> tuple[Tensor, Tensor]:
    """The factor c on S, and ||c S||, which is `previous` at the next step. Paper, section 4.3 and its ablation.

    "growth": ||c S|| <= gamma ||previous||; "shrink": ||c S|| = gamma ||S|| + (1 - gamma) ||previous||; "scale":
    c = gamma. An infinite `previous` is no history, an infinite `norm` a negligible residual, which leaves none: for
    the first two c = 1.
    """
    if gamma is None:
        return torch.ones_like(norm), norm
    if limiter == "scale":
        c = torch.full_like(norm, gamma)
    elif limiter == "shrink":
        c = gamma + (1 - gamma) * previous / norm
        c = torch.where(torch.isfinite(norm) & torch.isfinite(previous) & (norm > 0), c, 1.0)
    else:
        c = torch.where(torch.isfinite(norm), gamma * (previous + EPS) / norm, 1.0).clamp_(max=1.0)
    return c, c * norm


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, accurate in fp32 for any t."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def step_size(lr: float, betas: tuple[float, float], t: Tensor) -> Tensor:
    """eta = lr sqrt(1 - b2^t) / (1 - b1^t) at update t = 1, 2, ..., of t's shape."""
    return lr * bias_correction(betas[1], t).sqrt() / bias_correction(betas[0], t)


def advance(
    norms: Tensor, steps: list[Tensor], lr: float, betas: tuple[float, float] | None, add: Add = None
) -> tuple[Tensor, Tensor]:
    """Which matrices make an update, (B,) bool, and its size eta, (B, 1, 1), which is 0 for the others.

    norms: of the rows of G, (B, long, n), the last of n; steps: the count of each, 0-dim, to which an update is added.
    betas: where they correct the bias.
    """
    active = are_usable(norms[..., -1:], add)
    torch._foreach_add_(steps, [*active.float()])
    return active, torch.where(active.view(-1, 1, 1), step_sizes(steps, lr, betas), 0.0)


def step_sizes(steps: list[Tensor], lr: float, betas: tuple[float, float] | None) -> Tensor:
    """eta at these updates, (B, 1, 1)."""
    t = torch.stack(steps).view(-1, 1, 1)
    return torch.full_like(t, lr) if betas is None else step_size(lr, betas, t)


@dataclass(frozen=True)
class Scales:
    """The settings of `scales`; (s, k) is how alpha enters the residual."""

    alpha: float
    s: float
    k: float
    scaling: str
    gamma: float | None
    limiter: str
    negligible: float


def scales(
    G_norms: Tensor,
    R_norms: Tensor,
    N_norms: Tensor,
    eta: Tensor,
    histories: list[Tensor],
    settings: Scales,
    active: Tensor | None = None,
    add: Add = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `apply_updates` is given: a = alpha eta, (B, 1, 1), and B = s c phi eta, (B, long, 1); and for statistics
    ||s c S|| and c, (B, 1, 1).

    Norms of rows: (B, long, 1). histories: the limited norm of each last residual, 0-dim, which become those of this
    one where it is `active`.
    """
    if active is not None:
        G_norms = torch.where(active.view(-1, 1, 1), G_norms, 0.0)
    phi = residual_scale(N_norms, R_norms, settings.scaling, add)
    norm = residual_norm(phi, G_norms, R_norms, settings.k, add, settings.negligible)
    return limited_scales(phi, norm, eta, histories, settings, active)


def limited_scales(
    phi: Tensor, norm: Tensor, eta: Tensor, histories: list[Tensor], settings: Scales, active: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scales` from phi and ||S||."""
    previous = torch.stack(histories).view(-1, 1, 1)
    c, limited_norm = limit(norm, previous, settings.gamma, settings.limiter)
    if active is not None:
        limited_norm = torch.where(active.view(-1, 1, 1), limited_norm, previous)
    torch._foreach_copy_(histories, list(limited_norm.flatten()))
    return settings.alpha * eta, phi * (settings.s * c * eta), settings.s * c * norm, c
