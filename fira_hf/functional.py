r"""One step of Fira on one matrix, as functions on tensors. Letters are those of the paper (arXiv 2410.01623).

Every matrix is seen with its long side first: rows = long, columns = short; a wide weight comes as its transposed
view. With r = rank:

    G    gradient             long x short
    Q    basis                short x r, orthonormal columns
    R    low-rank gradient    long x r,     R = G Q
    M, V moments of R         long x r
    N    Adam direction       long x r,     N = M / (sqrt(V) + eps)
    phi  scale                long x 1,     phi_i = ||N_i|| / (||R_i|| + 1e-8)
    S    scaled residual      long x short, S = phi (G - k R Q^T)          never built

Since Q is orthonormal, ||S_i||^2 = phi_i^2 (||G_i||^2 - k (2 - k) ||R_i||^2): the limiter's factor c is known before
any tensor of the weight's size exists, and the whole update is one product of rank r and one pass over G:

    W <- (1 - lr wd) (W - eta [(alpha N - s c k phi R) Q^T + s c phi G]),      eta = lr sqrt(1 - b2^t) / (1 - b1^t)

(s, k) = (1, alpha) is the published code, (alpha, 1) is the paper; they are the same at alpha = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The epsilon of phi and of the limiter in the published code (fira 1.0.2, fira_adamw.py).
EPS = 1e-8
# A residual below a thousandth of the scaled gradient is rounding noise of the closed form in fp32 (the square is
# known to about 1e-7 of the gradient's). As a reference for growth it would switch the residual off for a thousand
# steps, so it does not count as history.
NEGLIGIBLE = 1e-3
# Rows are taken in blocks of about this many elements where a step has to convert or mask the gradient.
BLOCK = 2**20


def tall(matrix: Tensor) -> Tensor:
    """The matrix as it is, or its transposed view, so that rows >= columns. Square matrices stay."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()


def row_norms(matrix: Tensor) -> Tensor:
    """Norm of each row, fp32: (rows, columns) -> (rows, 1)."""
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True, dtype=torch.float32)


def is_usable(norms: Tensor) -> Tensor:
    """0-dim bool: the gradient with these row norms is finite (its square in fp32, too) and not zero."""
    total = torch.linalg.vector_norm(norms)
    return torch.isfinite(total) & (total > 0)


def project(G: Tensor, Q: Tensor) -> Tensor:
    """R = G Q in fp32, (long, short) x (short, r) -> (long, r). A gradient of another dtype is converted in blocks."""
    if G.dtype == torch.float32:
        return G @ Q
    return torch.cat([block.float() @ Q for block in row_blocks(G)])


def direction(
    R: Tensor, M: Tensor, V: Tensor, betas: tuple[float, float], eps: float, active: Tensor | None = None
) -> Tensor:
    """Updates the moments M and V in place with R and returns N = M / (sqrt(V) + eps); all (long, r) fp32.

    Bias correction is left to `step_size`, so N, and with it phi, is uncorrected, as in the published code.
    `active`: 0-dim bool on the device; where it is False the moments stay as they are (R must then be zero).
    """
    keep1, keep2 = betas if active is None else (torch.where(active, beta, 1.0) for beta in betas)
    M.mul_(keep1).add_(R, alpha=1 - betas[0])
    V.mul_(keep2).addcmul_(R, R, value=1 - betas[1])
    N = V.sqrt().add_(eps)
    return torch.div(M, N, out=N)


def residual_scale(N_norms: Tensor, R_norms: Tensor, scaling: str) -> Tensor:
    """phi, (long, 1), from the row norms of N and R: one a row ("column"), one in all ("matrix"), or 1 ("none")."""
    if scaling == "none":
        return torch.ones_like(R_norms)
    if scaling == "matrix":
        N_norms, R_norms = (torch.linalg.vector_norm(norms).expand_as(norms) for norms in (N_norms, R_norms))
    return N_norms / (R_norms + EPS)


def residual_norm(phi: Tensor, G_norms: Tensor, R_norms: Tensor, k: float) -> Tensor:
    """||S|| of S = phi (G - k R Q^T) in closed form, 0-dim; infinite where S is negligible beside phi G.

    phi, G_norms, R_norms: (long, 1). The subtraction can come out below zero where nearly all of G lies in the
    subspace and k = 1; it is clamped.
    """
    left = (G_norms.square() - k * (2 - k) * R_norms.square()).clamp_(min=0).sqrt_()
    norm, whole = torch.linalg.vector_norm(phi * left), torch.linalg.vector_norm(phi * G_norms)
    return torch.where(norm > NEGLIGIBLE * whole, norm, torch.inf)


def limit(norm: Tensor, previous: Tensor, gamma: float | None) -> tuple[Tensor, Tensor]:
    """Norm-growth limiter: the factor c <= 1 on S, and ||c S||, which is `previous` at the next step.

    An infinite `previous` is no history: c = 1. An infinite `norm` is a negligible residual: c = 1, and no history.
    """
    if gamma is None:
        return torch.ones_like(norm), norm
    c = torch.where(torch.isfinite(norm), gamma * (previous + EPS) / norm, 1.0).clamp_(max=1.0)
    return c, c * norm


def step_size(lr: float, betas: tuple[float, float], t: float | Tensor) -> float | Tensor:
    """eta = lr sqrt(1 - b2^t) / (1 - b1^t) at update t = 1, 2, ...; of t's kind (number or 0-dim tensor)."""
    return lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)


def apply_update(
    W: Tensor, G: Tensor, A: Tensor, Q: Tensor, B: Tensor, decay: float, active: Tensor | None = None
) -> None:
    """W <- decay (W - A Q^T - B G) in place, rounded once to W's dtype.

    W, G: (long, short), any float dtype; A: (long, r), Q: (short, r), B: (long, 1), fp32.
    `active`: 0-dim bool on the device; where it is False nothing is written, whatever is in G.
    """
    if W.dtype == torch.float32 and G.dtype == torch.float32 and active is None:
        W.addmm_(A, Q.t(), beta=decay, alpha=-decay).addcmul_(B, G, value=-decay)
        return
    blocks = (row_blocks(W), row_blocks(G), row_blocks(A, like=W), row_blocks(B, like=W))
    for w, g, a, b in zip(*blocks, strict=True):
        new = torch.addmm(w.float(), a, Q.t(), alpha=-1).addcmul_(b, g.float(), value=-1).mul_(decay)
        w.copy_(new if active is None else torch.where(active, new, w))


def row_blocks(tensor: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Views of consecutive rows: about `BLOCK` elements each, or as many rows as in the blocks of `like`."""
    shape = (tensor if like is None else like).shape
    return tensor.split(max(1, BLOCK // max(1, shape[1:].numel())))
