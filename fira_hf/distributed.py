"""Where several processes train one model: who does what, and what goes over the network."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


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


def broadcast(Q: Tensor | None, like: Tensor, owner: int, group: ProcessGroup) -> Tensor | None:
    """The basis, (short, r) as `like`, that rank `owner` of the group found; None where it found none."""
    flat = torch.empty_like(like.t(), memory_format=torch.contiguous_format)
    if is_own(owner, group):
        flat.copy_(torch.full_like(like, torch.nan).t() if Q is None else Q.t())
    dist.broadcast(flat, group=group, group_src=owner)
    return None if flat[0, 0].isnan() else flat.t()
