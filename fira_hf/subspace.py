"""Finding the basis: gradients -> Q with orthonormal columns, (short, r) fp32, of the gradient's shorter side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import TINY, are_usable, column_major, product, transposed_product
from .views import tall

# Up to this many columns the exact basis, from the Gram matrix, is cheaper than a power iteration.
EXACT = 64
# Largest accepted entry of Q^T Q - I after a decomposition in fp32, which comes out below 1e-5.
TOLERANCE = 2e-5
# Of the trace of a Gram matrix, added to its diagonal; and of an old basis, added to a new one.
SHIFT, FILL = 1e-6, 1e-4

Bases = list[Tensor | None]


def find_bases(
    grads: Sequence[Tensor], rank: int, method: str, previous: Sequence[Tensor | None], seeds: Sequence[int]
) -> Bases:
    """New bases, each (short, min(rank, short)) fp32 and column-major, for gradients of one shape.

    The gradients are as stored (not transposed), finite and not zero, of any float dtype. `previous` holds the bases
    so far, None at a first refresh; `seeds` is for what is drawn at random, one a gradient. None comes back where no
    orthonormal basis was found, in fp32 and in fp64; the caller goes on with the one that it has.
    """
    return METHODS[method](grads, rank, previous, seeds)


def svd(grads: Sequence[Tensor], rank: int, previous: Sequence[Tensor | None], seeds: Sequence[int]) -> Bases:
    """The leading singular vectors (GaLore 2403.03507 eq. 12; the published choice of Fira).

    The decomposition is that of the gradient as it is stored, not of its transposed view: the moments live on in the
    coordinates of the next basis, so even the signs of the vectors must be those of the published code.
    """

    def decompose(grad: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
        return Vh[:rank].t() if grad.shape[0] >= grad.shape[1] else U[:, :rank]

    return [_in_fp32_or_fp64(decompose, grad) for grad in grads]


def power(grads: Sequence[Tensor], rank: int, previous: Sequence[Tensor | None], seeds: Sequence[int]) -> Bases:
    """Block power iteration Q <- orth(G^T G Q): one from the previous basis, or two from a sketch of the gradient.

    As refreshes go on, the columns turn towards the singular vectors, in falling order (orthogonal iteration; Golub
    and Van Loan, Matrix Computations, 8.2.4). Where the short side has at most `EXACT` columns, the basis is exact.
    """
    matrices = [tall(grad) for grad in grads]
    if matrices[0].shape[1] <= EXACT:
        scaled = [G.float() / G.abs().amax() for G in matrices]
        return [leading_eigenvectors(G.t() @ G, rank) for G in scaled]
    starts: Bases = list(previous)
    for i, (G, seed) in enumerate(zip(matrices, seeds, strict=True)):
        if starts[i] is None:
            (start,) = sketch([G], rank, [None], [seed])
            (starts[i],) = [None] if start is None else orthonormalize(_iterate(G, start)[None])
    products = {i: _iterate(matrices[i], Q) for i, Q in enumerate(starts) if Q is not None}
    if not products:
        return starts
    found = dict(zip(products, orthonormalize(torch.stack(list(products.values()))), strict=True))
    return [found.get(i) for i in range(len(grads))]


def random(grads: Sequence[Tensor], rank: int, previous: Sequence[Tensor | None], seeds: Sequence[int]) -> Bases:
    """A random subspace, whatever the gradient (as in Flora 2402.03293 and APOLLO 2412.05270, but orthonormal)."""
    short = min(grads[0].shape)
    return orthonormalize(torch.stack([draw((short, min(rank, short)), grads[0].device, seed) for seed in seeds]))


def sketch(grads: Sequence[Tensor], rank: int, previous: Sequence[Tensor | None], seeds: Sequence[int]) -> Bases:
    """The span of r random sums of the gradient's rows: one pass over the gradient, no product.

    Every row goes, with a random sign, into one of the sums (count sketch; Clarkson and Woodruff 1207.6365).
    """
    matrices, device = [tall(grad) for grad in grads], grads[0].device
    r = min(rank, matrices[0].shape[1])
    sums = [random_sums(G, signs(len(G), seed, device), r) for G, seed in zip(matrices, seeds, strict=True)]
    return orthonormalize(torch.stack(sums).mT)


def random_sums(G: Tensor, signs: Tensor, r: int) -> Tensor:
    """(r, columns) fp32: row i of G, times its sign (rows, 1), goes into sum i mod r."""
    sums = torch.zeros(r, G.shape[1], dtype=torch.float32, device=G.device)
    for rows, sign in zip(G.split(r), signs.split(r), strict=True):
        sums[: len(rows)].addcmul_(rows, sign)
    return sums


def signs(rows: int, seed: int, device: torch.device) -> Tensor:
    """(rows, 1) of 1 and -1, at random."""
    coins = torch.randint(0, 2, (rows, 1), device=device, generator=_generator(device, seed))
    return coins.float().mul_(2).sub_(1)


METHODS: dict[str, Callable[..., Bases]] = {"svd": svd, "power": power, "random": random, "sketch": sketch}


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _iterate(G: Tensor, Q: Tensor) -> Tensor:
    """G^T G Q up to a factor, (short, r) fp32; for a G of any size whose norm is finite in fp32."""
    P = product(G, Q, G.new_empty(len(G), Q.shape[1], dtype=torch.float32))
    P.div_(P.abs().amax().clamp_(min=TINY))
    return transposed_product(G, P)


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor | None:
    """The leading right singular vectors of G, (short, r) fp32, from G^T G."""
    return _in_fp32_or_fp64(lambda gram: torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank], gram)


def refine(
    ops: Any, grads: Sequence[Tensor], method: str, previous: Sequence[Tensor], seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """New bases, (B, short, r) fp32, from previous ones, and which of them are good, (B,) bool: nothing is read by the
    host, as "svd" would be.

    grads: with the long side first, of any values; a basis is not good where its gradient is zero or not finite.
    ops: `functional` or `kernels`, or what has their `project` and `transposed_products`.
    """
    if method == "random":
        norms = torch.stack(torch._foreach_norm(list(grads), 2.0, torch.float32)).view(-1, 1, 1)
        Y = torch.stack([draw(Q.shape, Q.device, seed) for Q, seed in zip(previous, seeds, strict=True)])
    else:
        P, norms = ops.project(grads, previous)
        P.div_(P.abs().amax(dim=(1, 2), keepdim=True).clamp_(min=TINY))
        Y = ops.transposed_products(grads, P)
    Q, good = cholesky_qr(Y, None if method == "random" else torch.stack([Q.float() for Q in previous]))
    return Q, good & are_usable(norms)


def draw(shape: torch.Size | tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """A random matrix, fp32."""
    return torch.randn(shape, dtype=torch.float32, device=device, generator=_generator(device, seed))


def cholesky_qr(Y: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """CholeskyQR twice: Q, (B, short, r), and whether it is orthonormal (its entries below 1e-5 off), (B,) bool.

    With orthonormal `previous`, what Y lacks in rank is theirs, and a pass with a shifted Gram matrix comes before
    (Fukaya et al., SIAM J. Sci. Comput. 42, 2020): where the host does not look, nothing else takes what fails.
    """
    Y = _scaled(Y)
    Q = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_(min=TINY)
    shifts: tuple[float, ...] = (0.0, 0.0)
    if previous is not None:
        Q, shifts = Q.add_(previous, alpha=FILL), (SHIFT, 0.0, 0.0)
    eye = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device).expand(len(Y), -1, -1)
    for shift in shifts:
        # cholesky_ex does not raise: what it could not factorise shows in the last Gram matrix. A product with the
        # inverse of the small factor takes half as long as solving for all of Q.
        gram = Q.mT @ Q
        if shift:
            gram += shift * gram.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) * eye
        L = torch.linalg.cholesky_ex(gram).L
        Q = Q @ torch.linalg.solve_triangular(L, eye, upper=False).mT
    # Of a Q that is nearly orthonormal the factor is exact, and what comes out is orthonormal to rounding.
    return Q, torch.linalg.matrix_norm(gram - eye) <= 0.5  # False for NaN, too


def orthonormalize(Y: Tensor) -> Bases:
    """Orthonormal bases of the columns of Y, (B, short, r): CholeskyQR twice, or QR where that is not accurate."""
    Q, good = cholesky_qr(Y)
    return [
        column_major(q) if ok else _in_fp32_or_fp64(lambda y: torch.linalg.qr(y).Q, _scaled(y))
        for q, y, ok in zip(Q, Y, good.tolist(), strict=True)
    ]


def _scaled(Y: Tensor) -> Tensor:
    """Y, (..., short, r), with 1 as its largest absolute value, whose square no product can carry out of fp32."""
    return Y / Y.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=TINY)


def _orthogonality_error(Q: Tensor) -> Tensor:
    """Largest entry of |Q^T Q - I|: (..., short, r) -> (...)."""
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().amax(dim=(-2, -1))


def _in_fp32_or_fp64(decompose: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor | None:
    """decompose(matrix), computed in fp32, or in fp64 where fp32 fails; None where neither gives a basis."""
    for dtype in (torch.float32, torch.float64):
        try:
            Q = column_major(decompose(matrix.to(dtype)).float())
        except torch.linalg.LinAlgError:
            continue
        if _orthogonality_error(Q) <= TOLERANCE:
            return Q
    return None
