"""Where several processes train one model: who does what, and what goes over the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from .functional import TINY, Basis, are_usable, product, total_norms, transposed_product
from .subspace import (
    EXACT,
    cholesky_qr,
    draw,
    leading_eigenvectors,
    orthonormalize,
    random,
    random_sums,
    signs,
)
from .views import folded_shape


def owners(costs: list[int], group: ProcessGroup | None) -> list[int]:
    """For each task the rank that does it, so that all ranks have about as much to do; without a group all are 0's."""
    load = [0] * (1 if group is None else dist.get_world_size(group))
    owner = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: (-costs[task], task)):
        owner[task] = load.index(min(load))
        load[owner[task]] += costs[task]
    return owner


def is_own(owner: int, group: ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == owner


def broadcast(Q: Tensor | None, like: Tensor, owner: int, group: ProcessGroup) -> Tensor:
    """The basis, (short, r) as `like`, that rank `owner` of the group found; NaN where it found none."""
    flat = torch.empty_like(like.t(), memory_format=torch.contiguous_format)
    if is_own(owner, group):
        flat.copy_(torch.full_like(like, torch.nan).t() if Q is None else Q.t())
    dist.broadcast(flat, group=group, group_src=owner)
    return flat.t()


def add_up_gradients(parameters: Iterable[Any]) -> None:
    """Where a process has a part of a sum, as for a replicated weight beside sharded activations, it gets the gradient
    of its part of the weight."""
    for p in parameters:
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


@dataclass(frozen=True)
class Shards:
    """The rows of a weight, split over the processes of a group as `fully_shard` does it: in equal chunks, but for the
    last ones, which may be smaller or empty. `is_tall`: whether the rows are its long side.

    Low-rank tensors are split along the long side. For a tall weight each process has the gradient's part of the same
    rows, and only norms, and sums over columns, are exchanged. For a wide one each has a part of every sum over the
    short side: partial sums are added up and each process gets its rows (`collect`), and what it makes of them goes to
    all (`spread`).
    """

    group: ProcessGroup
    is_tall: bool

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def own(self, rows: int) -> slice:
        """This process's part of so many rows."""
        return _chunk(rows, self.count, self.rank)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def collect(self, R: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Partial low-rank gradients (B, long, r) and row norms (B, long, k) -> their sums, this process's rows."""
        if self.is_tall:
            return R, norms
        long, rank = R.shape[1:]
        parts = _rows_first(torch.cat([R, norms.square()], dim=2), -(-long // self.count) * self.count)
        rows = parts.new_empty(len(parts) // self.count, *parts.shape[1:])
        dist.reduce_scatter(rows, list(parts.chunk(self.count)), group=self.group)
        own = self.own(long)
        rows = rows[: own.stop - own.start].transpose(0, 1)
        return rows[..., :rank].contiguous(), rows[..., rank:].sqrt()

    def spread(self, A: Tensor, B: Tensor, long: int) -> tuple[Tensor, Tensor]:
        """A (B, rows, r) and B (B, rows, 1) of this process's rows -> of those that its part of the weight needs."""
        if self.is_tall:
            return A, B
        rows = self._gather(torch.cat([A, B], dim=2), long).transpose(0, 1)
        return rows[..., :-1], rows[..., -1:]

    def own_columns(self, Q: Basis, short: int) -> Basis:
        """The part of a basis (short, r) that this process's part of the gradient is multiplied with; of a range of
        columns the same as counted from the first one that this process has."""
        if self.is_tall:
            return Q
        own = self.own(short)
        return range(Q.start - own.start, Q.stop - own.start) if isinstance(Q, range) else Q[own]

    def _whole(self, Y: Tensor, short: int) -> Tensor:
        """(short, r) from this process's part: a term of the sum, or some of the rows."""
        if self.is_tall:
            return self.add(Y)
        return self._gather(Y[None], short)[:, 0]

    def _gather(self, part: Tensor, rows: int) -> Tensor:
        """(B, own rows, k) of each process -> (rows, B, k), all of them."""
        part = _rows_first(part, -(-rows // self.count))
        whole = part.new_empty(len(part) * self.count, *part.shape[1:])
        dist.all_gather(list(whole.chunk(self.count)), part, group=self.group)
        return whole[:rows]

    def find_basis(
        self, G: Tensor, shape: torch.Size, rank: int, method: str, previous: Tensor | None, seed: int
    ) -> Tensor | None:
        """What `subspace.find_bases` does for one gradient of a whole shape of which this process has the part G, with
        its long side first; "svd" is not to be had without the whole gradient."""
        long, short = max(shape), min(shape)
        r = min(rank, short)
        if method == "random":
            return random([G.new_empty(1, dtype=torch.float32).expand(long, short)], rank, [None], [seed])[0]
        if short <= EXACT and method == "power":
            scaled = G.float() / self._largest(G)
            if self.is_tall:
                return leading_eigenvectors(self._whole(scaled.t() @ scaled, short), rank)
            whole = self._whole(scaled.t(), short)
            return leading_eigenvectors(whole @ whole.t(), rank)
        if previous is None:
            own = self.own(long) if self.is_tall else slice(0, long)
            sums = random_sums(G, signs(long, seed, G.device)[own], r).roll(own.start, 0)
            (previous,) = orthonormalize(self._whole(sums.t().contiguous(), short)[None])
            if method == "sketch" or previous is None:
                return previous
            (previous,) = orthonormalize(self._iterate(G, previous, short)[None])
        return None if previous is None else orthonormalize(self._iterate(G, previous, short)[None])[0]

    def refine(self, G: Tensor, previous: Tensor, method: str, seed: int, short: int) -> tuple[Tensor, Tensor]:
        """What `subspace.refine` does, for one gradient of which this process has the part G."""
        norm = total_norms(torch.linalg.vector_norm(G, dtype=torch.float32).view(1, 1, 1), self.add)
        is_random = method == "random"
        Y = draw(previous.shape, G.device, seed) if is_random else self._iterate(G, previous.float(), short)
        Q, good = cholesky_qr(Y[None], None if is_random else previous.float()[None])
        return Q[0], good[0] & are_usable(norm)[0]

    def _iterate(self, G: Tensor, Q: Tensor, short: int) -> Tensor:
        """G^T G Q up to a factor, (short, r)."""
        P = product(G, self.own_columns(Q, short), Q.new_empty(len(G), Q.shape[1], dtype=torch.float32))
        if not self.is_tall:
            self.add(P)
        return self._whole(transposed_product(G, P.div_(self._largest(P))), short)

    def _largest(self, tensor: Tensor) -> Tensor:
        """The largest absolute value on any process, but not 0."""
        largest = (tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.clamp_(min=TINY)


def _chunk(rows: int, count: int, rank: int) -> slice:
    """The part of process `rank` when `count` of them split so many rows as DTensor does."""
    size = -(-rows // count)
    return slice(min(rows, rank * size), min(rows, (rank + 1) * size))


def _rows_first(tensor: Tensor, rows: int) -> Tensor:
    """(B, n, k) -> (rows, B, k), contiguous, filled up with zeros."""
    out = tensor.new_zeros(rows, len(tensor), tensor.shape[2])
    out[: tensor.shape[1]] = tensor.transpose(0, 1)
    return out


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _split_dimensions(p: Any) -> list[int]:
    """The dimensions of its mesh over which it is not just repeated; none if it is no DTensor."""
    if not isinstance(p, DTensor):
        return []
    return [dim for dim, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]


def shards_of(p: Any, split: int, transposed: bool, convolution: bool) -> Shards | None:
    """How the rows of a projected matrix are sharded; None: they are not. Of a stack, processes hold whole matrices.

    Raises:
        RuntimeError: it is sharded otherwise than `fully_shard` does it by default, or it fuses parts.
    """
    dims = _split_dimensions(p)
    if not dims:
        return None
    if len(dims) > 1 or p.placements[dims[0]] != Shard(0):
        raise RuntimeError(
            f"FiraAdamW cannot train a weight of shape {tuple(p.shape)} that is sharded as {p.placements}: use "
            "fully_shard, which splits the first dimension, on one dimension of the mesh."
        )
    shape = folded_shape(p.shape, convolution)
    if len(shape) == 3 and (split == 1 or len(p) % p.device_mesh.size(dims[0]) == 0):
        return None
    if split > 1:
        raise RuntimeError(
            f"FiraAdamW cannot take a weight of shape {tuple(p.shape)} apart into {split} where it is sharded, unless "
            "each process has the same number of matrices of a stack: leave it out of split_pattern."
        )
    # Of a square weight the outputs are its long side, and they are the columns of one stored (in, out).
    rows, columns = shape
    is_tall = rows > columns or (rows == columns and not transposed)
    return Shards(p.device_mesh.get_group(dims[0]), is_tall)


def own_of_stack(p: Any) -> range:
    """Which of the matrices that a 3-D weight stacks this process holds: all, or its chunk."""
    dims = _split_dimensions(p)
    if not dims:
        return range(len(p))
    mesh = p.device_mesh
    return range(len(p))[_chunk(len(p), mesh.size(dims[0]), mesh.get_local_rank(dims[0]))]


def sharded_like(p: Any, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The whole, split like p, of which this process has a part, as a DTensor; just the part if p is none."""
    if not isinstance(p, DTensor):
        return part
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def agree(ok: Tensor, parameters: list[Any]) -> Tensor:
    """Whether it is so, a 0-dim bool, on all processes that hold parts of the parameters."""
    groups = {p.device_mesh.get_group(dim): None for p in parameters for dim in _split_dimensions(p)}
    for group in groups:
        votes = ok.to(torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        ok = votes.bool()
    return ok
