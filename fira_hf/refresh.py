"""When a matrix gets a new basis, which process finds it, and what becomes of its moments."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from . import base_optimizers
from . import functional as F
from .distributed import broadcast, is_own, owners
from .matrices import Matrix, batches, operations, operations_of_moments, read, write
from .state import OF_REFRESH, has_basis, is_whole, low_rank_moments, rounds_state, seed_of
from .subspace import find_bases, refine


def refresh(
    matrices: list[Matrix],
    group: dict[str, Any],
    first_states: dict[Any, dict[str, Any]],
    process_group: ProcessGroup | None,
) -> None:
    """Finds the bases of a parameter group that are due, and creates the states of matrices with the first ones.

    On the CPU a basis is due by the updates that its matrix has made, so the host looks at `step`, and at which
    gradients are usable. An accelerator is read for first bases only: later ones are due by calls, which the host
    counts, and the device keeps the old basis where the gradient is not usable. (Not with "svd": torch reads
    the device to decompose.)
    `first_states`: of the parameters that have none. `process_group`: replicas that share the work. A weight that is
    sharded has none: of a stack each process has matrices of its own.
    """
    if process_group is not None:
        own = [matrix for matrix in matrices if isinstance(matrix.parameter, DTensor)]
        refresh(own, group, first_states, None)
        matrices = [matrix for matrix in matrices if not isinstance(matrix.parameter, DTensor)]
    without = [matrix for matrix in matrices if not has_basis(group, min(matrix.shape))]
    # A choice of columns needs no gradient: on every device the next one's turn comes by calls.
    for matrix in (m for m in without if m.begun and m.is_due_by_calls(group)):
        if group["moments"] == "rotated" and group["rank"] < min(matrix.shape):
            matrix.forget(group)  # the old columns have no part in the new ones
    for matrix in _due([matrix for matrix in without if not matrix.begun], group, first_states):
        matrix.begin(None, group)
    matrices = [matrix for matrix in matrices if has_basis(group, min(matrix.shape))]
    if matrices and matrices[0].parameter.device.type != "cpu" and group["projection"] != "svd":
        _refine([m for m in matrices if m.begun and m.is_due_by_calls(group)], group, process_group)
        matrices = [matrix for matrix in matrices if not matrix.begun]
    due = _due([matrix for matrix in matrices if not matrix.begun or matrix.refresh_in == 0], group, first_states)
    if not due:
        return
    rank = group["rank"]
    sharded = {matrix: matrix.shards for matrix in due if matrix.shards is not None}
    for matrix, shards in sharded.items():
        method, wait, seed = due.pop(matrix)
        Q = matrix.read("basis").float() if matrix.begun else None
        G = matrix.tall(matrix.refreshed_from(group))
        _take(matrix, shards.find_basis(G, matrix.shape, rank, method, Q, seed), wait, group)
    owner = dict(zip(due, owners([matrix.weight.numel() for matrix in due], process_group), strict=True))
    found: dict[Matrix, Tensor | None] = {}
    for method in sorted({method for method, _, _ in due.values()}):
        chosen = (matrix for matrix in due if due[matrix][0] == method and is_own(owner[matrix], process_group))
        for batch in batches(chosen, rank):
            previous = [matrix.read("basis").float() if matrix.begun else None for matrix in batch]
            grads = [matrix.refreshed_from(group) for matrix in batch]
            batch_seeds = [due[matrix][2] for matrix in batch]
            bases = dict(zip(batch, find_bases(grads, rank, method, previous, batch_seeds), strict=True))
            if process_group is not None:
                found |= bases
                continue
            for matrix, Q in bases.items():
                _take(matrix, Q, due[matrix][1], group)
    if process_group is not None:
        # All have found their share: now each basis goes from its owner to the others.
        for matrix, (_, wait, _) in due.items():
            short = min(matrix.weight.shape)
            like = matrix.grad.new_empty(short, min(rank, short), dtype=torch.float32)
            Q = broadcast(found.get(matrix), like, owner[matrix], process_group)
            _take(matrix, None if Q[0, 0].isnan() else Q, wait, group)


def _due(
    matrices: list[Matrix], group: dict[str, Any], first_states: dict[Any, dict[str, Any]]
) -> dict[Matrix, tuple[str, int, int]]:
    """The matrices that get a basis now -> by which method, in how many updates the next one is due, and a seed."""
    if not matrices:
        return {}
    parts = torch._foreach_norm([matrix.grad for matrix in matrices], 2.0, torch.float32)
    norms = torch.stack([part.to(parts[0].device) for part in parts]).view(-1, 1, 1)
    for shards in {matrix.shards: None for matrix in matrices if matrix.shards is not None}:
        chosen = [i for i, matrix in enumerate(matrices) if matrix.shards == shards]
        norms[chosen] = F.total_norms(norms[chosen], shards.add)
    usable = F.are_usable(norms).tolist()
    gap, due = group["update_proj_gap"], {}
    for matrix, ok in zip(matrices, usable, strict=True):
        if not ok:
            continue
        if not matrix.state:
            matrix.state.update(first_states[matrix.parameter])
        done = int(matrix["step"].item()) if matrix.begun else 0
        wait = (matrix.phase(group) - done) % gap or gap
        seed = seed_of(matrix.state, matrix.place, done)
        if not matrix.begun:
            # All need their first basis at once: where refreshes are staggered, it has to be a cheap one.
            is_cheap = group["refresh"] == "together" or group["projection"] == "random"
            due[matrix] = (group["projection"] if is_cheap else "sketch", wait, seed)
        elif wait == gap:
            due[matrix] = (group["projection"], wait, seed)
        else:
            matrix.refresh_in = wait
    return due


def _refine(due: list[Matrix], group: dict[str, Any], process_group: ProcessGroup | None) -> None:
    """New bases for matrices that have one, without a read by the host."""
    owner = dict(zip(due, owners([matrix.weight.numel() for matrix in due], process_group), strict=True))
    found: dict[Matrix, Tensor] = {}
    for batch in batches((m for m in due if m.shards or is_own(owner[m], process_group)), group["rank"]):
        ops, shards = operations(batch[0].parameter), batch[0].shards
        if is_whole(group) and not shards:
            ops = _OfMoments(batch, group)
            grads = [matrix.tall(matrix.grad) for matrix in batch]
        else:
            grads = [matrix.tall(matrix.refreshed_from(group)) for matrix in batch]
        previous = read(batch, "basis")
        seeds = [seed_of(matrix.state, matrix.place, matrix.state["calls"]) for matrix in batch]
        if shards:
            each = zip(grads, previous, seeds, strict=True)
            new = [shards.refine(G, Q, group["projection"], seed, min(batch[0].shape)) for G, Q, seed in each]
            Q, good = (torch.stack(column) for column in zip(*new, strict=True))
        else:
            Q, good = refine(ops, grads, group["projection"], previous, seeds)
        if process_group is None or shards:
            _change_bases(batch, Q, good, group)
        else:
            found |= dict(zip(batch, torch.where(good.view(-1, 1, 1), Q, torch.nan), strict=True))
    if process_group is None:
        return
    for matrix in due:
        if not matrix.shards:
            Q = broadcast(found.pop(matrix, None), matrix.read("basis").float(), owner[matrix], process_group)
            _change_bases([matrix], Q[None], ~Q[None, 0, 0].isnan(), group)


class _OfMoments:
    """The products of `functional` with X of a whole moment (see `whole`) in place of the gradients, of which X is
    not made. The norms stay those of the gradients: without one there is no step, and no basis to find."""

    def __init__(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        self._project, _ = operations_of_moments(operations(matrices[0].parameter))
        self._moments = [matrix.whole_moment(group) for matrix in matrices]
        self._beta = group["betas"][0]

    def project(self, grads: list[Tensor], bases: list[Tensor]) -> tuple[Tensor, Tensor]:
        Z, norms = self._project(grads, self._moments, bases, self._beta)
        return Z, norms[..., 1:]

    def transposed_products(self, grads: list[Tensor], P: Tensor) -> Tensor:
        turned = [replace(M, is_turned=not M.is_turned) for M in self._moments]
        products: Tensor = self._project([G.t() for G in grads], turned, list(P), self._beta)[0]
        return products


def _take(matrix: Matrix, Q: Tensor | None, wait: int, group: dict[str, Any]) -> None:
    """Gives the matrix its new basis; None is a basis that could not be found: the old one stays, if there is one."""
    if matrix.begun:
        if Q is not None:
            _change_bases([matrix], Q[None], None, group)
    elif Q is not None:
        matrix.begin(Q, group)
    else:
        message = "No orthonormal basis was found in a finite gradient: the matrix, {} x {}, stays as it is now."
        warnings.warn(message.format(*matrix.shape), RuntimeWarning, stacklevel=2)
    if matrix.begun:
        matrix.refresh_in = wait


def _change_bases(matrices: list[Matrix], Q: Tensor, good: Tensor | None, group: dict[str, Any]) -> None:
    """New bases, (B, short, r), of matrices of one shape. `good`: (B,) bool on the device; where it is False,
    everything stays as it is. None: all are.

    All is made before anything is written, so that where memory runs out no state is half a new one."""
    # A whole moment is in no basis.
    names = list(low_rank_moments(group)) if group["moments"] == "rotated" and not is_whole(group) else []
    old = {name: torch.stack(read(matrices, name)) for name in ("basis", *names)}
    new, seeds = [Q], {}
    if names:
        # Where a step was broken off in between, a matrix can have a basis and have made no update.
        steps = torch.stack([matrix["step"] for matrix in matrices]).view(-1, 1, 1).clamp_(min=1)
        b1, b2 = (F.bias_correction(beta, steps) for beta in group["betas"])
        moments, C = [old[name].float() for name in names], old["basis"].float().mT @ Q
        new += base_optimizers.rotated_moments(group["base_optimizer"], moments, C, b2 / b1.square())
    if rounds_state(group):
        seeds = {
            name: [matrix.rounding_seed(use + OF_REFRESH) for matrix in matrices] for use, name in enumerate(names)
        }
    if good is not None:
        new = [torch.where(good.view(-1, 1, 1), one, old[name]) for name, one in zip(old, new, strict=True)]
    for name, values in zip(old, new, strict=True):
        write(matrices, name, values, good, seeds.get(name))
