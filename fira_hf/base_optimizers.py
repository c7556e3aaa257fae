"""The base optimizers of the subspace: what they keep of R = G Q, the direction N that they make of it, and its size.

Letters and shapes as in `functional`: R, N and all moments are fp32 here, and moments are updated in place. For Lion
and Muon the step is lr N, for Adam and Adafactor `functional.step_size` corrects the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam

TINY = torch.finfo(torch.float32).tiny  # divisors that may be zero are kept at or above it

# Sums a tensor over all processes that share the rows of a matrix; None: there are no others.
Add = Callable[[Tensor], Tensor] | None


# The moments of R that a base optimizer keeps, as named in the state -> whether each has the rows and columns of R.
# What has no rows comes first: processes that share the rows all hold it, and round it with the same draws.
MOMENTS = {
    "adamw": {"exp_avg": (True, True), "exp_avg_sq": (True, True)},
    "lion": {"exp_avg": (True, True)},
    "muon": {"exp_avg": (True, True)},
    "adafactor": {"exp_avg_sq_col": (False, True), "exp_avg_sq_row": (True, False), "exp_avg": (True, True)},
}
Moments = list[list[Tensor]]  # for each name, that of each of B matrices


def adam(R: Tensor, moments: Moments, betas: tuple[float, float], eps: float, active: Tensor | None) -> Tensor:
    """N = M / (sqrt(V) + eps)."""
    # torch's fused Adam, in one pass: at lr = -1 it adds M / (sqrt(V) + eps) to zeros, and b^inf = 0 leaves its bias
    # correction out.
    N = torch.zeros_like(R)
    never = R.new_full((), torch.inf)
    settings: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "lr": -1.0, "weight_decay": 0.0}
    settings |= {"beta1": betas[0], "beta2": betas[1], "eps": eps}
    M, V = moments
    if active is None:
        fused_adam(list(N), list(R), M, V, [], [never] * len(R), **settings)
    else:
        for n, r, m, v, stop in zip(N, R, M, V, (~active).float(), strict=True):
            fused_adam([n], [r], [m], [v], [], [never], found_inf=stop, **settings)
    return N


def lion(R: Tensor, moments: Moments, betas: tuple[float, float]) -> Tensor:
    """N = sign(b1 M + (1 - b1) R), M <- b2 M + (1 - b2) R (arXiv 2302.06675, algorithm 2)."""
    (M,) = moments
    N = torch.stack(torch._foreach_lerp(M, list(R), 1 - betas[0])).sign_()
    torch._foreach_lerp_(M, list(R), 1 - betas[1])
    return N


def muon(R: Tensor, moments: Moments, betas: tuple[float, float], add: Add) -> Tensor:
    """N = X (X^T X)^(-1/2), nearly, of X = b1 M + (1 - b1) R: Muon with Nesterov momentum (arXiv 2502.16982)."""
    (M,) = moments
    torch._foreach_lerp_(M, list(R), 1 - betas[0])
    return orthogonalized(torch.stack(torch._foreach_lerp(M, list(R), 1 - betas[0])), add)


# Muon's quintic iteration (torch.optim.Muon): singular values above a thousandth of the norm come out near 1, between
# 0.7 and 1.2, and those that are smaller grow 485-fold.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Above this rank a device with units for products in bf16 iterates on X: products of r x r in fp32 would cost more.
GRAM_RANK = {"accelerator": 512, "cpu": 256}
# Of the CPU: AMX. Without it products in bf16 may take a hundred times as long as in fp32. torch 2.9 does not tell.
MULTIPLIES_BF16 = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_bf16", False)


def orthogonalized(X: Tensor, add: Add = None) -> Tensor:
    """X p(X^T X), (B, long, r), with the singular values of X brought near 1 and its singular vectors.

    The polynomial p is found on the r x r matrix alone, so two products of X's size are all there are. Zeros stay, and
    so does whatever rank X lacks: nothing is inverted.
    """
    if X.device.type != "cpu":
        in_bf16 = X.shape[2] > GRAM_RANK["accelerator"]
    else:  # processes on CPUs of two kinds would wait for sums that the others do not make
        in_bf16 = X.shape[2] > GRAM_RANK["cpu"] and add is None and MULTIPLIES_BF16
    if in_bf16:
        return orthogonalized_in_bf16(X, add)
    a, b, c = NEWTON_SCHULZ
    gram = X.mT @ X
    gram = gram if add is None else add(gram)
    square = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=TINY).view(-1, 1, 1)
    A, eye = gram / square, torch.eye(X.shape[2], dtype=X.dtype, device=X.device)
    whole = factor = torch.baddbmm(A, A, A, beta=b, alpha=c).add_(eye, alpha=a)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        A = factor @ A @ factor  # all are polynomials of one matrix: they commute
        factor = torch.baddbmm(A, A, A, beta=b, alpha=c).add_(eye, alpha=a)
        whole = whole @ factor
    return X @ (whole / square.sqrt())


def orthogonalized_in_bf16(X: Tensor, add: Add = None) -> Tensor:
    """The same by products of X itself, fifteen of its size, in bf16, as torch.optim.Muon makes them. Returns fp32."""
    a, b, c = NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)
    norm = norm if add is None else add(norm.square()).sqrt_()
    Y = (X / norm.clamp_(min=TINY)).bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = Y.mT @ Y
        A = A if add is None else add(A)
        Y = torch.baddbmm(Y, Y, torch.baddbmm(A, A, A, beta=b, alpha=c), beta=a)
    return Y.float()


def adafactor(R: Tensor, moments: Moments, betas: tuple[float, float], eps: float, add: Add) -> Tensor:
    """N = M / (sqrt(V) + eps), V_ij = row_i col_j / mean(col), where row follows the means of R^2 over its rows, and
    col the sums over its columns (arXiv 1804.04235, algorithm 2)."""
    col, row, M = moments
    squares = R.square()
    torch._foreach_lerp_(M, list(R), 1 - betas[0])
    torch._foreach_lerp_(row, list(squares.mean(2, keepdim=True)), 1 - betas[1])
    columns = squares.sum(1, keepdim=True)
    torch._foreach_lerp_(col, list(columns if add is None else add(columns)), 1 - betas[1])
    columns = torch.stack(col)
    columns = columns / columns.mean(2, keepdim=True).clamp_(min=TINY)
    roots = torch.stack(row).sqrt_() * columns.sqrt_()
    return torch.stack(M).div_(roots.add_(eps))


def rms_scale(base_optimizer: str, long: int, short: int, rank: int) -> float:
    """What a low-rank update is multiplied with to be as large as AdamW's of the whole matrix, whose rates then serve.

    The entries of N are of AdamW's size, but there are only long x r of them: sqrt(short / r). Muon's singular values
    are 1, and with 0.2 sqrt(long) the root mean square is AdamW's 0.2 (arXiv 2502.16982; "match_rms_adamw" in
    torch.optim.Muon).
    """
    return 0.2 * math.sqrt(long) if base_optimizer == "muon" else math.sqrt(short / rank)


def rotated_moments(base_optimizer: str, moments: Sequence[Tensor], C: Tensor, ratio: Tensor) -> list[Tensor]:
    """Moments (B, ...) carried into new bases; C = Q_old^T Q_new, (B, r, r).

    The mean turns with the basis; the variance, whose covariances are not known, is carried over by the squares of C
    (LDAdam, arXiv 2410.16103): M <- M C,  V <- max(V - m M^2, 0) C^2 + m (M C)^2, with `ratio` m = (1 - b2^t) /
    (1 - b1^t)^2, which accounts for the bias correction. Of Adafactor's V the columns are carried over, V <- V C^2.
    """
    if base_optimizer == "adamw":
        M, V = moments
        variance = (V - M.square().mul_(ratio)).clamp_(min=0) @ C.square()
        M = M @ C
        return [M, variance.add_(M.square().mul_(ratio))]
    *means, M = moments
    if means:
        col, row = means
        turned = col @ C.square()
        before = col.mean(-1, keepdim=True).clamp_(min=TINY)
        means = [turned, row * (turned.mean(-1, keepdim=True) / before)]  # V_ij = row_i col_j / mean(col)
    return [*means, M @ C]
