"""The matrices of a step, one by one and in batches: what a step and a refresh read and write of weights and state."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import functional as F
from . import int8, views, whole
from .base_optimizers import MOMENTS
from .codes import CODES, SCALE, decode, encode, is_coded
from .distributed import Shards, local, own_of_stack, shards_of
from .state import (
    OF_MOMENTS,
    State,
    create_state,
    follow_layout,
    is_whole,
    low_rank_moments,
    of_layout,
    rounding_seed,
    rounds_state,
    seed_of,
)

# Matrices of one shape are taken together up to this many elements of their low-rank gradients: 4 MiB on the CPU;
# elsewhere 64 MiB, so that starting the operations does not take longer than the operations.
BATCH = {"cpu": 2**20}
BATCH_ELSEWHERE = 2**24


class Matrix:
    """One projected matrix: a parameter, or one of those that it stacks or fuses, with its part of the state.

    `weight` and `grad` are views, (out, in); of a sharded matrix this process's rows. `index` and `place` tell which
    one of a stack it is, among those of this process and among all.
    """

    __slots__ = ("grad", "index", "parameter", "place", "shape", "shards", "state", "weight")

    def __init__(
        self,
        parameter: Any,
        state: State,
        index: int | None,
        place: int,
        shards: Shards | None,
        weight: Any,
        grad: Any,
        whole_shape: torch.Size,
    ) -> None:
        self.parameter, self.state, self.index, self.place, self.shards = parameter, state, index, place, shards
        self.weight, self.grad = weight, grad
        self.shape = whole_shape if shards else weight.shape

    @property
    def is_tall(self) -> bool:
        """Whether the rows of the whole are its long side."""
        return self.shards.is_tall if self.shards else self.shape[0] >= self.shape[1]

    def tall(self, tensor: Any) -> Any:
        """Weight or gradient, or this process's part of it, with the long side of the whole first."""
        return tensor if self.is_tall else tensor.t()

    def whole_moment(self, group: dict[str, Any]) -> whole.Whole:
        """Its first moment, where that is as large as the weight."""
        stored = [local(self.state[name]) for name in ("exp_avg", "exp_avg_scale") if name in self.state]
        split, transposed = (1, False) if self.shards else (group["split"], group["transposed"])
        # Parts come as (out, in), and a moment is read as it is stored.
        parts = [views.parts(tensor, split, transposed)[self.index or 0] for tensor in stored]
        values, *scales = [part.t() for part in parts] if transposed else parts
        columns = self.weight.shape[0 if transposed else 1]
        return whole.Whole(values, scales[0] if scales else None, columns, self.is_tall == transposed)

    def refreshed_from(self, group: dict[str, Any]) -> Tensor:
        """What a basis is found from, in the gradient's shape: the gradient, or X of a whole moment. The gradient
        alone has too much noise for the directions in which the moment is large."""
        if not is_whole(group) or not self.begun:
            found: Tensor = self.grad
            return found
        G = self.tall(self.grad)
        X = self.whole_moment(group).read(slice(0, len(G))).lerp_(G.float(), 1 - group["betas"][0] ** 2)
        is_there = G.any().float()  # without a gradient there is no step, and no basis to find
        return self.tall(X.mul_((self.shards.add(is_there) if self.shards else is_there) > 0))

    def phase(self, group: dict[str, Any]) -> int:
        """At which update, modulo the interval, the basis is due."""
        first: int = self.state["phase"]
        if self.index is None or group["refresh"] != "staggered":
            return first
        (count,) = views.stacked(views.folded_shape(self.parameter.shape, group["convolution"]), group["split"])
        return first + group["update_proj_gap"] * self.place // count

    def is_due_by_calls(self, group: dict[str, Any]) -> bool:
        """Where calls count, and not updates: whether this one is that of a refresh."""
        return bool((self.state["calls"] - self.phase(group)) % group["update_proj_gap"] == 0)

    def columns(self, group: dict[str, Any]) -> range:
        """Where there is no basis, the columns of the short side that are the subspace now."""
        short = min(self.shape)
        rank = min(group["rank"], short)
        changes = 1 + (self.state["calls"] - self.phase(group)) // group["update_proj_gap"]
        order = _order(-(-short // rank), seed_of(self.state, self.place))
        first = min(rank * order[changes % len(order)], short - rank)  # the last block overlaps the one before
        return range(first, first + rank)

    @property
    def begun(self) -> bool:
        """Whether it has a basis."""
        return self.refresh_in is not None

    def begin(self, Q: Tensor | None, group: dict[str, Any]) -> None:
        """Takes the first basis (short, r); None where the matrix needs none."""
        if "residual_norm" not in self.state:
            new = create_state(self.parameter, group, self.state)
            self.state.update(new)
            vars(self.state).update(vars(new))
        self.refresh_in = 0
        if Q is not None:
            write([self], "basis", Q[None])

    def forget(self, group: dict[str, Any]) -> None:
        """See `State.forget`, of this one."""
        for name in (*low_rank_moments(group), "step"):
            self[name].zero_()

    def rounding_seed(self, use: int = 0) -> int:
        """The seed of one rounding in this step; `use` tells apart what is rounded within it."""
        return rounding_seed(self.state, self.place, use)

    def read(self, name: str) -> Tensor:
        """A tensor of the state as it is kept, or a copy in fp32 of one that is kept as codes."""
        return read([self], name)[0]

    def __getitem__(self, name: str) -> Any:
        value = local(self.state[name])
        return value if self.index is None else value[self.index]

    @property
    def refresh_in(self) -> int | None:
        value: Any = self.state.refresh_in
        return value[self.place] if isinstance(value, list) else value

    @refresh_in.setter
    def refresh_in(self, value: int) -> None:
        if isinstance(self.state.refresh_in, list):
            self.state.refresh_in[self.place] = value
        else:
            self.state.refresh_in = value


def read(matrices: Sequence[Matrix], name: str) -> list[Tensor]:
    """Of each matrix a tensor of its state as it is kept, or a copy in fp32 of one that is kept as codes."""
    stored = [matrix[name] for matrix in matrices]
    if not is_coded(matrices[0].state, name):
        return stored
    scales, ops = [matrix[name + SCALE] for matrix in matrices], operations(matrices[0].parameter)
    if ops is F:
        return [decode(one, scale, CODES[name]) for one, scale in zip(stored, scales, strict=True)]
    return list(ops.decode(stored, scales, CODES[name]))


def write(
    matrices: Sequence[Matrix],
    name: str,
    values: Tensor,
    active: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Stores fp32 values, (B, ...), which may be changed, rounded at random where there are seeds, one for each.

    `active`: (B,) bool on the device; where it is False, codes stay. What is no code is written all the same.
    """
    stored = [matrix[name] for matrix in matrices]
    if not is_coded(matrices[0].state, name):
        if seeds is None:
            torch._foreach_copy_(stored, list(values))
            return
        for old, new, seed in zip(stored, values, seeds, strict=True):
            F.store(old, new, F.generator(old, seed))
        return
    scales, ops = [matrix[name + SCALE] for matrix in matrices], operations(matrices[0].parameter)
    if ops is not F:
        ops.encode(values.contiguous(), stored, scales, CODES[name], active, seeds)
        return
    for i, value in enumerate(values):
        coded = encode(value[None], CODES[name], seeds and seeds[i : i + 1])
        for old, (new,) in zip((stored[i], scales[i]), coded, strict=True):
            old.copy_(new if active is None else torch.where(active[i], new, old))


def update_moments(
    matrices: Sequence[Matrix], group: dict[str, Any], R: Tensor, active: Tensor | None, add: F.Add
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.direction` of matrices of one shape, whose low-rank moments are updated as they are kept."""
    base, state, ops = group["base_optimizer"], matrices[0].state, operations(matrices[0].parameter)
    names, seeds = list(MOMENTS[base]), None
    if rounds_state(group):
        seeds = [[matrix.rounding_seed(OF_MOMENTS + i) for matrix in matrices] for i in range(len(names))]
    settings = (group["betas"], group["eps"], active, seeds, add)
    found: tuple[Tensor, Tensor, Tensor]
    if is_coded(state, "exp_avg") and ops is not F and base != "adafactor":
        of_codes = [([m[name] for m in matrices], [m[name + SCALE] for m in matrices]) for name in names]
        found = ops.direction_of_codes(base, R, of_codes, *settings)
        return found
    moments = [read(matrices, name) for name in names]
    found = ops.direction(base, R, moments, *settings)
    for i, name in enumerate(names):
        if is_coded(state, name):
            write(matrices, name, torch.stack(moments[i]), active, seeds[i] if seeds else None)
    return found


@functools.cache
def _order(blocks: int, seed: int) -> list[int]:
    """The order in which blocks of columns take turns."""
    order: list[int] = torch.randperm(
        blocks, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    ).tolist()
    return order


def matrices_of(p: Any, states: Mapping[Any, dict[str, Any]], group: dict[str, Any]) -> list[Matrix]:
    """The matrices of a parameter, all with its one state, which is empty before the first of them begins."""
    split, transposed, convolution = of_layout(group)
    state: Any = states.get(p) or State()
    if p.ndim == 2 and split == 1 and not (transposed or isinstance(p, DTensor) or int8.is_int8(p)):
        return [Matrix(p, state, None, 0, None, p.detach(), p.grad, p.shape)]  # nearly always; and soon done
    shape, shards = views.folded_shape(p.shape, convolution), shards_of(p, split, transposed, convolution)
    weight, grad = int8.view(local(p.detach())), local(p.grad)
    if convolution:
        follow_layout(p, state, group)
        # A gradient that lies otherwise than its weight is copied, so that both have their columns in one order.
        channels_last = bool(views.is_channels_last(weight))
        weight, grad = views.folded(weight, channels_last), views.folded(grad, channels_last)
    if shards is not None:
        return [Matrix(p, state, None, 0, shards, weight, grad, shape)]
    weights, grads = views.parts(weight, split, transposed), views.parts(grad, split, transposed)
    if not views.stacked(shape, split):
        return [Matrix(p, state, None, 0, None, weights[0], grads[0], shape)]
    first = own_of_stack(p).start * split if len(shape) == 3 else 0
    both = enumerate(zip(weights, grads, strict=True))
    return [Matrix(p, state, index, first + index, None, w, g, shape) for index, (w, g) in both]


def batches(matrices: Iterable[Matrix], rank: int) -> Iterator[list[Matrix]]:
    """Matrices of one shape (as tall ones), device, dtype and layout, at most `BATCH` low-rank elements together."""
    alike: dict[Any, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        shape, p = matrix.shape, matrix.parameter
        # On the CPU matrices are gone through one by one, however they lie in memory.
        lie: tuple[Any, ...] = ()
        if p.device.type != "cpu":
            # A whole moment lies as the shape says, whichever way the weight does.
            lie = (shape[0] >= shape[1], matrix.weight.stride(), matrix.grad.stride())
        kind = (int8.is_int8(local(p)), p.dtype, p.grad.dtype, matrix.shards, lie)
        alike[max(shape), min(shape), p.device, kind].append(matrix)
    for (long, short, device, _), members in alike.items():
        size = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // (long * min(rank, short)))
        for i in range(0, len(members), size):
            yield members[i : i + size]


def operations(p: Tensor) -> Any:
    """The module that makes the steps of such a weight: `functional`, or `kernels` where Triton can run them and the
    environment does not say FIRA_HF_TRITON=0."""
    if is_traceable_wrapper_subclass(p) and not isinstance(p, DTensor) and not int8.is_int8(p):
        return F  # the numbers of torchao's tensors lie in other ones, whose addresses are not its own
    return _operations(p.device)


def by_device(items: Sequence[Any], device: Callable[[Any], torch.device] = lambda p: p.device) -> list[list[Any]]:
    """The items of each device; nearly always there is one."""
    found: dict[torch.device, list[Any]] = {}
    for item in items:
        found.setdefault(device(item), []).append(item)
    return list(found.values())


@contextmanager
def products_on(p: Tensor) -> Iterator[None]:
    """Where products are made with a weight: on its device, as Triton launches on the current one whatever its tensors
    are on; and not in half precision, as autocast would have them."""
    is_on_gpu = p.device.type == "cuda" and torch.cuda.is_available()
    with torch.cuda.device(p.device) if is_on_gpu else nullcontext(), torch.autocast(p.device.type, enabled=False):
        yield


def operations_of_moments(ops: Any) -> tuple[Any, Any]:
    """What reads and what writes whole moments where `ops` are the `operations`: `project` and `apply_updates` of
    `whole`, or the kernels of these."""
    return (whole.project, whole.apply_updates) if ops is F else (ops.project_moments, ops.apply_moment_updates)


def updates_of_int8(ops: Any) -> Any:
    """What updates int8 weights where `ops` are the `operations`."""
    return int8.apply_updates if ops is F else ops.apply_int8_updates


@functools.cache
def _operations(device: torch.device) -> Any:
    if os.environ.get("FIRA_HF_TRITON") == "0":
        return F
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    # Products of bf16 on tensor cores need compute capability 8.0. ROCm has not been tried.
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return F
    can_run = (
        torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if not (is_interpreted or can_run):
        return F
    from . import kernels

    return kernels
