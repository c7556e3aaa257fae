r"""One step of Fira on matrices of one shape, as functions on tensors. Letters: as in the paper (arXiv 2410.01623).

Every matrix is seen with its long side first: rows = long, columns = short; a wide weight comes as its transposed
view. Low-rank tensors of several matrices are stacked along a leading dimension B, so that what is small costs one
operation for all of them. With r = rank:

    G    gradient                 long x short
    Q    basis                    short x r, orthonormal columns
    R    low-rank gradient    B x long x r,     R = G Q
    M, V moments of R             long x r
    N    Adam direction       B x long x r,     N = M / (sqrt(V) + eps)
    phi  scale                B x long x 1,     phi_i = ||N_i|| / (||R_i|| + 1e-8)
    S    scaled residual          long x short, S = phi (G - k R Q^T)          never built

Since Q is orthonormal, ||S_i||^2 = phi_i^2 (||G_i||^2 - k (2 - k) ||R_i||^2): the limiter's factor c is known before
any tensor of the weight's size exists, and the whole update is one product of rank r and one pass over G:

    W <- (1 - lr wd) (W - eta [(alpha N - s c k phi R) Q^T + s c phi G]),      eta = lr sqrt(1 - b2^t) / (1 - b1^t)

N and eta are Adam's; `base_optimizers` has those of others. eta is multiplied by their `rms_scale`, unless
adjust_lr="none". With projection="columns" Q is a `range`: R is so many neighbouring columns of G, and N goes into
those of W.
(s, k) = (1, alpha) is the published code, (alpha, 1) is the paper, the same at alpha = 1; (0, 1) leaves S out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .base_optimizers import TINY as TINY  # part of these functions' vocabulary, and so of their users'
from .base_optimizers import Add, Moments, adafactor, adam, lion, muon
from .scales import EPS as EPS
from .scales import NEGLIGIBLE as NEGLIGIBLE
from .scales import Scales as Scales
from .scales import advance as advance
from .scales import are_usable as are_usable
from .scales import bias_correction as bias_correction
from .scales import limit as limit
from .scales import limited_scales as limited_scales
from .scales import residual_norm as residual_norm
from .scales import residual_scale as residual_scale
from .scales import scales as scales
from .scales import step_size as step_size
from .scales import step_sizes as step_sizes
from .scales import total_norms as total_norms

# Rows are taken in blocks of about this many elements, so that what is converted stays small and what is read twice
# is still in the cache.
BLOCK = 2**20


# Of `fp32_products`: how many threads are inside, and the precisions that the first of them found.
_lock, _inside = threading.Lock(), [0]
_before: dict[Any, str] = {}


@contextmanager
def fp32_products() -> Iterator[None]:
    """Products of fp32 are made in fp32, whatever the training allows: TF32 by TrainingArguments(tf32=True), bf16 by
    torch.set_float32_matmul_precision("medium"). A basis that is found in less is not orthonormal.

    torch knows one precision for all threads, so the last one that leaves brings it back: autograd has a thread for
    each GPU, and with weights that are stepped in backward they come here together.
    """
    backends: Any = torch.backends
    with _lock:
        _inside[0] += 1
        for one in (backends.cuda.matmul, backends.mkldnn.matmul):
            if _inside[0] == 1 and one.fp32_precision not in ("ieee", "none"):
                _before[one], one.fp32_precision = one.fp32_precision, "ieee"
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            while not _inside[0] and _before:
                one, precision = _before.popitem()
                # "none" follows torch.backends.fp32_precision, as it did if the two are alike.
                one.fp32_precision = "none" if precision == backends.fp32_precision else precision


def column_major(Q: Tensor) -> Tensor:
    """A copy of (..., short, r) with contiguous columns, the layout in which products with Q are fastest on a CPU."""
    return Q.mT.clone(memory_format=torch.contiguous_format).mT


def row_norms(matrix: Tensor) -> Tensor:
    """Norm of each row, fp32: (..., rows, columns) -> (..., rows, 1)."""
    if matrix.ndim > 2 or matrix.is_contiguous():
        return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True, dtype=torch.float32)
    # Row by row through a transposed view, torch takes several times as long as for the sum of squared rows.
    sums = torch.zeros(len(matrix), dtype=torch.float32, device=matrix.device)
    for rows in row_blocks(matrix.t(), size=min(BLOCK, matrix.numel()) // 4):
        sums += rows.float().square().sum(0)
    return sums.sqrt_().unsqueeze(1)


# A basis, (short, r); or the r neighbouring columns that span the subspace, some of which may lie outside of the part
# of the short side that this process has.
Basis = Tensor | range


def rank_of(Q: Basis) -> int:
    return len(Q) if isinstance(Q, range) else Q.shape[1]


def within(Q: range, short: int) -> tuple[slice, slice]:
    """Of a matrix with so many columns those in the range, and which ones of the range they are."""
    first, last = max(0, Q.start), max(0, Q.start, min(short, Q.stop))
    return slice(first, last), slice(first - Q.start, last - Q.start)


def project(grads: Sequence[Tensor], bases: Sequence[Basis]) -> tuple[Tensor, Tensor]:
    """R = G Q, (B, long, r), and the norms of the rows of G, (B, long, 1), both fp32."""
    R = grads[0].new_empty(len(grads), len(grads[0]), rank_of(bases[0]), dtype=torch.float32)
    for G, Q, out in zip(grads, bases, R, strict=True):
        product(G, Q, out)
    return R, torch.stack([row_norms(G) for G in grads])


def product(G: Tensor, Q: Basis, out: Tensor) -> Tensor:
    """out <- G Q in fp32, (long, short) x (short, r) -> (long, r). Other dtypes are converted in blocks."""
    if isinstance(Q, range):
        columns, places = within(Q, G.shape[1])
        out.zero_()[:, places] = G[:, columns]
        return out
    Q = Q.float()
    if G.dtype == torch.float32:
        return torch.mm(G, Q, out=out)
    for block, rows in zip(row_blocks(G), row_blocks(out, like=G), strict=True):
        torch.mm(block.float(), Q, out=rows)
    return out


def transposed_products(grads: Sequence[Tensor], P: Tensor) -> Tensor:
    """G^T P, (B, short, r) fp32, from P (B, long, r) fp32. Other dtypes are converted in blocks."""
    return torch.stack([transposed_product(G, p) for G, p in zip(grads, P, strict=True)])


def transposed_product(G: Tensor, P: Tensor) -> Tensor:
    """G^T P in fp32, (short, r)."""
    if G.dtype == torch.float32:
        return G.t() @ P
    Y = torch.zeros(G.shape[1], P.shape[1], dtype=torch.float32, device=G.device)
    for rows, part in zip(row_blocks(G), row_blocks(P, like=G), strict=True):
        Y.addmm_(rows.float().t(), part)
    return Y


def direction(
    base_optimizer: str,
    R: Tensor,
    stored: Moments,
    betas: tuple[float, float],
    eps: float,
    active: Tensor | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    add: Add = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates the moments in place with R; returns the direction N, (B, long, r), and the row norms of R and N, fp32.

    Bias correction is left to `step_size`, so N, and with it phi, is uncorrected, as in the published code. Moments
    that are not fp32 are rounded once, at random where there are `seeds` (one for each moment of each matrix).
    `active`: (B,) bool on the device; where it is False the moments stay as they are, and N and all norms are 0.
    """
    if active is not None:
        mask = active.view(-1, 1, 1)
        R = torch.where(mask, R, 0.0)
    moments = [[moment.float() for moment in of] for of in stored]
    before = [] if active is None or base_optimizer == "adamw" else [torch.stack(of) for of in moments]
    if base_optimizer == "adamw":
        N = adam(R, moments, betas, eps, active)
    elif base_optimizer == "adafactor":
        N = adafactor(R, moments, betas, eps, add)
    else:
        N = lion(R, moments, betas) if base_optimizer == "lion" else muon(R, moments, betas, add)
    if before:
        for of, old in zip(moments, before, strict=True):
            torch._foreach_copy_(of, list(torch.where(mask, torch.stack(of), old)))
        N = torch.where(mask, N, 0.0)
    for which, (of, new) in enumerate(zip(stored, moments, strict=True)):
        for i, moment in enumerate(of):
            store(moment, new[i], generator(moment, seeds[which][i] if seeds else None))
    return N, row_norms(R), row_norms(N)


def apply_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    N: Tensor,
    R: Tensor | None,
    a: Tensor,
    k: float,
    B: Tensor | None,
    bases: Sequence[Basis],
    decay: float,
    active: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    update: Callable[..., None] | None = None,
) -> None:
    """W <- decay (W - (a N - k B R) Q^T - B G) for each matrix, in place; N may be changed.

    a: (B, 1, 1); without R the bracket is a N. Without B only a N is applied: gradients are not read, nor, where
    nothing decays, columns outside of a range. `active`, `seeds`: one for each, or None; see `apply_update`, which
    `update` takes the place of.
    """
    A = N.mul_(a) if R is None or B is None else N.mul_(a).addcmul_(B, R, value=-k)
    for i, (W, G, Q) in enumerate(zip(weights, grads, bases, strict=True)):
        on, b = None if active is None else active[i], None if B is None else B[i]
        (update or apply_update)(W, G, A[i], Q, b, decay, on, generator(G, seeds[i] if seeds else None))


def apply_update(
    W: Tensor,
    G: Tensor,
    A: Tensor,
    Q: Basis,
    B: Tensor | None,
    decay: float,
    active: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """W <- decay (W - A Q^T - B G) in place, rounded once to W's dtype; at random where a generator is given.

    W, G: (long, short), any float dtype; A: (long, r), B: (long, 1), fp32.
    `active`: 0-dim bool on the device; where it is False nothing is written, whatever is in G.
    """
    exact = W.dtype == torch.float32 and (B is None or G.dtype == torch.float32) and active is None
    if isinstance(Q, range):
        columns, places = within(Q, W.shape[1])
        A, Q = A[:, places], range(columns.start, columns.stop)
        if B is None and decay == 1:
            W, Q = W[:, columns], range(len(Q))
    else:
        Q = Q.float()
    blocks = [row_blocks(x, like=W) for x in (W, A, *(() if B is None else (G, B)))]
    for w, a, *gb in zip(*blocks, strict=True):
        new = w if exact else w.to(torch.float32, copy=True)
        if isinstance(Q, range):
            new[:, Q.start : Q.stop].sub_(a)
            new.mul_(decay)
        else:
            new.addmm_(a, Q.t(), beta=decay, alpha=-decay)
        if gb:
            new.addcmul_(gb[1], gb[0], value=-decay)
        if not exact:
            store(w, new if active is None else torch.where(active, new, w), generator)


def store(target: Tensor, value: Tensor, generator: torch.Generator | None = None) -> None:
    """target <- value (fp32, which may be changed). With a generator, a bf16 target gets one of the two neighbours at
    random, the nearer the likelier, so that the mean is the value itself."""
    if target is value:
        return
    if generator is not None and target.dtype == torch.bfloat16:
        # A bf16 is the upper half of an fp32: what a random number carries over from the lower half rounds up.
        noise = torch.randint(0, 2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
        value.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    target.copy_(value)


def generator(like: Tensor, seed: int | None) -> torch.Generator | None:
    """A generator on the device of a tensor; None without a seed."""
    return None if seed is None else torch.Generator(like.device).manual_seed(seed)


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
    """AdamW by torch's fused kernel, in place, of weights that are not projected; nothing where `finite` is False.

    counts: updates before this one (0-dim fp32). Seeds: of what is rounded at random, or None. settings: lr, betas,
    eps, weight_decay. The kernel wants one dtype and one memory layout. A weight that differs from its gradient or
    moments in either is updated in blocks of its rows, in fp32, and rounded once.
    """
    of_kernel: dict[str, Any] = {"fused": True, "found_inf": (~finite).float(), "amsgrad": False, "maximize": False}
    of_kernel |= {"beta1": settings["betas"][0], "beta2": settings["betas"][1]}
    of_kernel |= {name: settings[name] for name in ("lr", "weight_decay", "eps")}
    plain: list[tuple[Tensor, ...]] = []
    for *tensors, count, weight_seed, state_seed in zip(
        weights, grads, exp_avgs, exp_avg_sqs, counts, weight_seeds, state_seeds, strict=True
    ):
        if all(x.dtype == torch.float32 and x.stride() == tensors[0].stride() for x in tensors):
            plain.append((*tensors, count))
            continue
        draws, draws_of_state = (generator(tensors[0], seed) for seed in (weight_seed, state_seed))
        for w, g, m, v in zip(*(row_blocks(torch.atleast_1d(x)) for x in tensors), strict=True):
            new_w, new_g, new_m, new_v = (
                x.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for x in (w, g, m, v)
            )
            adamw([new_w], [new_g], [new_m], [new_v], [], [count.clone()], **of_kernel)
            store(w, new_w, draws)
            store(m, new_m, draws_of_state)
            store(v, new_v, draws_of_state)
    if plain:
        weights, grads, exp_avgs, exp_avg_sqs, counts = (list(column) for column in zip(*plain, strict=True))
        adamw(weights, grads, exp_avgs, exp_avg_sqs, [], counts, **of_kernel)


def row_blocks(tensor: Tensor, like: Tensor | None = None, size: int = 0) -> tuple[Tensor, ...]:
    """Views of consecutive rows: about `size` (`BLOCK`) elements each, or as many rows as in the blocks of `like`.

    On an accelerator all at once: there the cost is that of starting operations.
    """
    like, size = tensor if like is None else like, size or BLOCK
    if like.numel() <= size or like.device.type != "cpu":
        return (tensor,)
    return tensor.split(max(1, size // like.shape[1:].numel()))
