"""Finding the basis: gradient -> Q with orthonormal columns, (short, r) fp32, of the gradient's shorter side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def svd_basis(grad: Tensor, rank: int) -> Tensor:
    """The leading `rank` singular vectors on the short side (GaLore 2403.03507 eq. 12; the published choice of Fira).

    The decomposition is that of the gradient as it is stored, not of its transposed view: the moments live on in the
    coordinates of the next basis, so even the signs of the vectors must be those of the published code.
    """
    U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
    return Vh[:rank].t() if grad.shape[0] >= grad.shape[1] else U[:, :rank]


# A method is a function of the gradient as stored, in fp32 or fp64, and the rank.
METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"svd": svd_basis}


def find_basis(grad: Tensor, rank: int, method: str) -> Tensor | None:
    """A new basis, (short, min(rank, short)) fp32 and contiguous, for a finite, non-zero gradient of any float dtype.

    A decomposition that does not converge in fp32 is repeated in fp64; None if that fails too, and the caller goes on
    with the basis that it has.
    """
    for dtype in (torch.float32, torch.float64):
        try:
            Q = METHODS[method](grad.to(dtype), rank).float().contiguous()
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(Q).all():
            return Q
    return None
