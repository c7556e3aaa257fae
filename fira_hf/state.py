"""The optimizer's state, matrix by matrix: what a step and a refresh read and write, and how they are batched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .distributed import Shards, local, sharded_like, shards_of

MOMENTS = ("exp_avg", "exp_avg_sq")
# Matrices of one shape are taken together up to this many elements of their low-rank gradients: 4 MiB on the CPU,
# elsewhere enough that starting the operations does not take longer than the operations.
BATCH = {"cpu": 2**20}
BATCH_ELSEWHERE = 2**22


def first_states(param_groups: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Parameter -> the plain numbers that its state begins with, from its place among all parameters.

    seed: for what is drawn at random. phase: the update, counted from 0, before which the basis is first refreshed,
    and then every `update_proj_gap`; staggered, so that each update has its share of the work.
    """
    first: dict[Any, dict[str, Any]] = {}
    staggered = [group for group in param_groups if group.get("refresh") == "staggered"]
    total = sum(p.numel() * group["rank"] for group in staggered for p in group["params"])
    before = 0
    for group in param_groups:
        for p in group["params"]:
            first[p] = {"seed": len(first)}
            if "rank" not in group:
                continue
            phases = []
            stack = F.stacked(p, group["split"])
            count = stack[0] if stack else 1
            for _ in range(count):
                phases.append(0)
                if group["refresh"] == "staggered":
                    phases[-1] = 1 + group["update_proj_gap"] * before // total
                    before += p.numel() // count * group["rank"]
            first[p]["phase"] = phases if stack else phases[0]
    return first


class Matrix:
    """One projected matrix: a parameter, or one of those that it stacks or fuses, with its part of the state.

    `weight` and `grad` are views, (out, in); of a sharded parameter this process's part, as it is stored.
    """

    __slots__ = ("grad", "index", "parameter", "shape", "shards", "state", "weight")

    def __init__(
        self,
        parameter: Any,
        state: dict[str, Any],
        index: int | None,
        shards: Shards | None,
        weight: Tensor,
        grad: Any,
    ) -> None:
        self.parameter, self.state, self.index, self.shards = parameter, state, index, shards
        self.weight, self.grad = weight, grad
        self.shape = parameter.shape if shards else weight.shape

    def tall(self, tensor: Tensor) -> Tensor:
        """Weight or gradient, or this process's part of it, with the long side of the whole first."""
        is_tall = self.shards.is_tall if self.shards else self.shape[0] >= self.shape[1]
        return tensor if is_tall else tensor.t()

    @property
    def begun(self) -> bool:
        """Whether it has a basis."""
        return "refresh_in" in self.state and self["refresh_in"] is not None

    def create(self, group: dict[str, Any], first: dict[str, Any]) -> None:
        """Creates the state of the parameter, with no basis yet; `first` is its entry in `first_states`."""
        p, dtype = self.parameter, getattr(torch, group["state_dtype"])
        stack, short, long = F.stacked(p, group["split"]), *sorted(self.shape)
        r, device = min(group["rank"], short), self.weight.data.device
        own = self.shards.own(long) if self.shards else slice(0, long)
        self.state.update(first, refresh_in=[None] * stack[0] if stack else None)
        for name in MOMENTS:
            part = torch.zeros(*stack, own.stop - own.start, r, dtype=dtype, device=device)
            self.state[name] = sharded_like(p, part, (*stack, long, r))
        self.state["step"] = torch.zeros(stack, device=device)
        self.state["residual_norm"] = torch.full(stack, torch.inf, device=device)
        self.state["basis"] = torch.zeros(*stack, r, short, dtype=dtype, device=device).mT

    def begin(self, Q: Tensor, group: dict[str, Any]) -> None:
        """Takes the first basis (short, r)."""
        if "basis" not in self.state:
            self.create(group, dict(self.state))
        self["refresh_in"] = 0
        self["basis"].copy_(Q)

    def __getitem__(self, name: str) -> Any:
        value = self.state[name]
        if self.shards is not None and name in MOMENTS:
            return local(value)
        return value if self.index is None else value[self.index]

    def __setitem__(self, name: str, value: int) -> None:
        if self.index is None:
            self.state[name] = value
        else:
            self.state[name][self.index] = value


def matrices_of(p: Any, states: Mapping[Any, dict[str, Any]], group: dict[str, Any]) -> list[Matrix]:
    """The matrices of a parameter, all with its one state, which is empty before the first of them begins."""
    state, split, transposed = states.get(p, {}), group["split"], group["transposed"]
    shards = shards_of(p, split, transposed)
    weight, grad = local(p.detach()), local(p.grad)
    if shards is not None:
        return [Matrix(p, state, None, shards, weight, grad)]
    weights = F.parts(weight, split, transposed)
    grads = [None] * len(weights) if grad is None else F.parts(grad, split, transposed)
    indices = range(len(weights)) if F.stacked(p, split) else [None]
    return [Matrix(p, state, index, None, w, g) for index, w, g in zip(indices, weights, grads, strict=True)]


def batches(matrices: Iterable[Matrix], rank: int) -> Iterator[list[Matrix]]:
    """Matrices of one shape (as tall ones), device, dtype and layout, at most `BATCH` low-rank elements together."""
    alike: dict[Any, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        shape, p = matrix.shape, matrix.parameter
        alike[max(shape), min(shape), p.device, p.dtype, p.grad.dtype, matrix.shards].append(matrix)
    for (long, short, device, *_), members in alike.items():
        size = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // (long * min(rank, short)))
        for i in range(0, len(members), size):
            yield members[i : i + size]


def next_seed(state: dict[str, Any]) -> int:
    """A seed for one draw; advances the state's (Knuth's MMIX generator), so that a resumed run draws the same."""
    state["seed"] = (state["seed"] * 6364136223846793005 + 1442695040888963407) % 2**63
    return int(state["seed"])


def rounding_generator(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Generator | None:
    """The generator of this step's roundings, if something of the parameter is rounded at random."""
    if group["state_dtype"] != "float32" or (group["stochastic_rounding"] and p.dtype == torch.bfloat16):
        return torch.Generator(p.device).manual_seed(next_seed(state))
    return None
