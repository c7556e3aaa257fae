"""The optimizer's state, matrix by matrix: what a step and a refresh read and write, and how they are batched."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from . import functional as F
from . import int8, whole
from .codes import CODES, SCALE, decode, encode, groups, is_coded
from .config import PACKED
from .distributed import Shards, local, own_of_stack, sharded_like, shards_of

# Matrices of one shape are taken together up to this many elements of their low-rank gradients: 4 MiB on the CPU;
# elsewhere 32 MiB, so that starting the operations does not take longer than the operations.
BATCH = {"cpu": 2**20}
BATCH_ELSEWHERE = 2**23
# What is rounded at random in a step, as `use` of a seed: 0 is the weight; then the moments by number, in the update
# and in a change of basis before it.
OF_MOMENTS, OF_REFRESH = 1, 4


class State(dict[str, Any]):
    """The state of a projected parameter: its entries are saved, its attribute is not.

    refresh_in: calls of `step()` that can pass before the basis may be due; None for a matrix that has no basis yet. A
    list of these for a stack, or a matrix in parts.
    """

    refresh_in: Any = None

    @property
    def begun(self) -> bool:
        """Whether a matrix of it has a basis."""
        places = self.refresh_in if isinstance(self.refresh_in, list) else [self.refresh_in]
        return any(place is not None for place in places)


def first_states(param_groups: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Parameter -> the plain numbers that its state begins with, from its place among all parameters.

    seed: for what is drawn at random. phase: the update, counted from 0, before which the basis is first refreshed,
    and then every `update_proj_gap`; staggered, so that each update has its share of the work.
    """
    first: dict[Any, dict[str, Any]] = {}
    staggered = [group for group in param_groups if group.get("refresh") == "staggered"]
    # Of matrices that have no elements, if there are no others, nothing is ever found.
    total = max(1, sum(p.numel() * group["rank"] for group in staggered for p in group["params"]))
    before = 0
    for group in param_groups:
        for p in group["params"]:
            first[p] = {"seed": len(first), "calls": 0}
            if "rank" not in group:
                continue
            first[p]["phase"] = 0
            if group["refresh"] == "staggered":
                first[p]["phase"] = 1 + group["update_proj_gap"] * before // total
                before += p.numel() * group["rank"]
    return first


def is_whole(group: Mapping[str, Any]) -> bool:
    """Whether the first moment is as large as the weight, and lies as it does."""
    return bool(group["residual"] == "moment")


def has_basis(group: Mapping[str, Any], short: int) -> bool:
    """Whether a matrix of this short side needs one. Columns are their own, and so is the whole space of a moment."""
    return bool(group["projection"] != "columns" and not (is_whole(group) and group["rank"] >= short))


def low_rank_moments(group: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
    """What there is of `functional.MOMENTS` in the state of a projected weight."""
    return {} if is_whole(group) else F.MOMENTS[group["base_optimizer"]]


def state_dtype_of(state_dtype: str) -> torch.dtype:
    """Of what is not kept as codes."""
    dtype: torch.dtype = torch.bfloat16 if state_dtype in PACKED else getattr(torch, state_dtype)
    return dtype


def of_layout(group: Mapping[str, Any]) -> tuple[int, bool, bool]:
    """How matrices lie in the weights of a group: what `shards_of` asks."""
    return group["split"], group["transposed"], group["convolution"]


@dataclass(frozen=True)
class Kept:
    """A tensor in the state of a projected weight.

    along: what it is split with where processes share a matrix: "weight", as large as it is; "long", rows of the long
    side, one by one; "", nothing, so that all have it. (Of a stack each process has what belongs to its matrices.)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    along: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# What the state of a projected weight depends on, beside its shape.
OF_SHAPES = ("rank", "split", "transposed", "convolution", "base_optimizer", "projection", "residual", "state_dtype")


def kept_tensors(shape: Iterable[int], group: Mapping[str, Any]) -> dict[str, Kept]:
    """The tensors in the state of a projected weight of this shape, by name; `group` has all of `OF_SHAPES`."""
    return _kept_tensors(tuple(shape), *(group[name] for name in OF_SHAPES))


@functools.cache
def _kept_tensors(shape: tuple[int, ...], *of_group: Any) -> dict[str, Kept]:
    group = dict(zip(OF_SHAPES, of_group, strict=True))
    split, transposed, convolution = of_layout(group)
    shape = F.folded_shape(torch.Size(shape), convolution)
    stack, (long, short) = F.stacked(shape, split), F.long_and_short(shape, split, transposed)
    r, dtype, kept = min(group["rank"], short), state_dtype_of(group["state_dtype"]), {}
    if is_whole(group) and group["state_dtype"] in PACKED:
        codes, scales = whole.packed_shapes(shape, whole.BITS[group["state_dtype"]])
        kept["exp_avg"] = Kept(codes, torch.int8 if group["state_dtype"] == "int8" else torch.uint8, "weight")
        kept["exp_avg_scale"] = Kept(scales, torch.bfloat16, "weight")
    elif is_whole(group):
        kept["exp_avg"] = Kept(shape, dtype, "weight")
    for name, (rows, columns) in low_rank_moments(group).items():
        kept[name] = Kept((*stack, long if rows else 1, r if columns else 1), dtype, "long" if rows else "")
    if has_basis(group, short):
        kept["basis"] = Kept((*stack, short, r), dtype)
    if group["state_dtype"] == "int8" and not is_whole(group):
        for name in [name for name in CODES if name in kept]:
            (*outer, _), along = kept[name].shape, kept[name].along
            kept[name] = Kept((*outer, r), CODES[name].dtype, along)
            kept[name + SCALE] = Kept((*outer, groups(r)), torch.bfloat16, along)
    return {**kept, "step": Kept(stack, torch.float32), "residual_norm": Kept(stack, torch.float32)}


def create_state(p: Any, group: dict[str, Any], first: dict[str, Any]) -> State:
    """The state of a projected parameter, with no basis yet; `first` is its entry in `first_states`."""
    shards, device = shards_of(p, *of_layout(group)), local(p.data).device
    of_part, is_stack = kept_tensors(local(p.data).shape, group), p.ndim == 3 and not group["convolution"]
    state = State(first)
    if group["convolution"]:
        state["channels_last"] = F.is_channels_last(local(p.data))
    for name, kept in kept_tensors(p.shape, group).items():
        shape = kept.shape
        if is_stack or kept.along == "weight":
            shape = of_part[name].shape
        elif kept.along == "long" and shards:
            rows = shards.own(shape[0])
            shape = (rows.stop - rows.start, *shape[1:])
        # Codes of zero are those of any scale: it is zero.
        part = torch.full(shape, torch.inf if name == "residual_norm" else 0, dtype=kept.dtype, device=device)
        part = F.column_major(part) if name == "basis" and kept.dtype.is_floating_point else part
        state[name] = sharded_like(p, part, kept.shape) if is_stack or kept.along else part
        if name == "step" and kept.shape:
            state.refresh_in = [None] * kept.shape[0]
    return state


def loaded_state(p: Any, saved: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a saved state on the weight's device, in the dtypes in which it was saved."""
    device, state = local(p.data).device, State()
    for name, value in saved.items():
        if isinstance(value, Tensor):
            is_basis = name == "basis" and value.is_floating_point()  # and no codes, which are decoded
            value = F.column_major(value.to(device)) if is_basis else value.to(device, copy=True).contiguous()
        state[name] = value
    if "residual_norm" in state:
        state.refresh_in = _refresh_in(p, saved, p.ndim == 3 and not group["convolution"])
    return state


def _refresh_in(p: Tensor, saved: dict[str, Any], is_stack: bool) -> Any:
    """`refresh_in` of a loaded state: the next call looks whether a basis is due. Who has a basis has made a step;
    columns count steps anew in every block, and need no more than that there was a call."""
    step, has_begun = saved["step"], "basis" not in saved and saved["calls"] > 0
    begun = [0 if count or has_begun else None for count in local(step).flatten().tolist()]
    if step.ndim == 0:
        return begun[0]
    split = len(step) // len(p) if is_stack else len(step)
    own = own_of_stack(p) if is_stack else range(1)
    return [None] * (own.start * split) + begun + [None] * (len(step) - own.stop * split)


def follow_layout(p: Any, state: State, group: Mapping[str, Any]) -> None:
    """Brings what the state of a convolution has by columns into the order in which the weight lies now.

    Before, the memory format of the model was another one: it was changed, or a checkpoint comes from there. A moment
    in codes is coded anew. A block of columns is one of other columns then, and its moments begin anew.
    """
    channels_last = F.is_channels_last(local(p.data))
    if state.get("channels_last", channels_last) == channels_last:
        return
    rows, columns = len(p) // group["split"], p[0].numel()
    outer = p.shape[1] if channels_last else p.shape[2:].numel()
    order = torch.arange(columns, device=local(p.data).device).view(outer, -1).t().flatten()
    if is_whole(group) and "exp_avg_scale" in state:
        codes, scales = local(state["exp_avg"]), local(state["exp_avg_scale"])
        values = whole.decode(codes, scales, columns)[..., order]
        for old, new in zip((codes, scales), whole.encode(values, whole.BITS[group["state_dtype"]]), strict=True):
            old.copy_(new)
    elif is_whole(group):
        _reordered(local(state["exp_avg"]), order, -1)
    of_rows = [name for name, (has_rows, _) in low_rank_moments(group).items() if has_rows]
    if columns <= rows and group["projection"] == "columns":
        for name in (*low_rank_moments(group), "step"):
            local(state[name]).zero_()
    for name in ["basis"] if columns <= rows else of_rows:
        for part in (name, name + SCALE):
            if part in state:
                _reordered(state[part], order, -2)
    state["channels_last"] = channels_last


def _reordered(value: Any, order: Tensor, dim: int) -> None:
    """Puts the entries of a tensor in another order, in place."""
    new = (value.full_tensor() if isinstance(value, DTensor) else value).index_select(dim, order)
    value.copy_(distribute_tensor(new, value.device_mesh, value.placements) if isinstance(value, DTensor) else new)


def misfit(p: Any) -> str | None:
    """What keeps a weight or its gradient from being used, as the end of a sentence; None: nothing. Reads no data."""
    data = local(p.data)
    if data.device.type == "meta":
        return "has no data, it is on the meta device"
    if p.grad is None:
        return None
    grad = local(p.grad)
    if p.grad.shape != p.shape or grad.shape != data.shape:
        return f"has a gradient of another shape, {tuple(p.grad.shape)}"
    if grad.device != data.device or grad.layout != torch.strided or not grad.dtype.is_floating_point:
        kind = f"{grad.dtype}, {grad.layout}, on {grad.device}"
        return f"is on {data.device} and has a gradient of another kind ({kind})"
    return None


def state_misfit(p: Any, state: Mapping[str, Any], group: Mapping[str, Any], elsewhere: bool = False) -> str | None:
    """What keeps the state of a weight from being used, as the end of a sentence; None: nothing. Reads no data.

    `elsewhere`: the state is a saved one, which is on any device.
    """
    if not state:
        return None
    if "rank" in group:
        if not isinstance(state, State) and not elsewhere:
            return (
                "has a state that was loaded past load_state_dict (with ZeroRedundancyOptimizer, let each process "
                "save optimizer.optim.state_dict() and load it by optimizer.optim.load_state_dict())"
            )
        if not isinstance(state.get("phase", 0), int):
            return "has an optimizer state as earlier versions saved it (phase is a list)"
        shapes = {name: kept.shape for name, kept in kept_tensors(p.shape, group).items()}
    else:
        shapes = {**dict.fromkeys(F.MOMENTS["adamw"], tuple(p.shape)), "step": ()}
    device = local(p.data).device
    for name, shape in shapes.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            return f"has an optimizer state without {name}"
        if value.shape != shape:
            kept = f"{name} is {tuple(value.shape)}, not {tuple(shape)}"
            return f"has the optimizer state of a weight of another shape ({kept})"
        if not elsewhere and value.device != device:
            return (
                f"is on {device}, but {name} of its optimizer state on {value.device} (which moves by "
                "optimizer.load_state_dict(optimizer.state_dict()))"
            )
    if isinstance(p, DTensor) != isinstance(state["exp_avg"], DTensor):
        one, other = ("is", "is not") if isinstance(p, DTensor) else ("is not", "is")
        return f"{one} sharded, but its optimizer state {other}"
    return None


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
        parts = [F.parts(tensor, split, transposed)[self.index or 0] for tensor in stored]
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
        (count,) = F.stacked(F.folded_shape(self.parameter.shape, group["convolution"]), group["split"])
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
            self.state.refresh_in = new.refresh_in
        self.refresh_in = 0
        if Q is not None:
            self.write("basis", Q)

    def forget(self, group: dict[str, Any]) -> None:
        """Sets the moments to zero, and the count of updates by which their bias is corrected."""
        for name in (*low_rank_moments(group), "step"):
            self[name].zero_()  # codes of zero are zero, whatever their scale

    def rounding_seed(self, use: int = 0) -> int:
        """The seed of one rounding in this step; `use` tells apart what is rounded within it."""
        return rounding_seed(self.state, self.place, use)

    def read(self, name: str) -> Tensor:
        """A tensor of the state as it is kept, or a copy in fp32 of one that is kept as codes."""
        return read([self], name)[0]

    def write(self, name: str, value: Tensor, active: Tensor | None = None, seed: int | None = None) -> None:
        """See `write`, of one matrix; `active`: 0-dim bool."""
        on = None if active is None else active.view(1)
        write([self], name, [value], on, None if seed is None else [seed])

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
        return list(decode(torch.stack(stored), torch.stack(scales), CODES[name]))
    return list(ops.decode(stored, scales, CODES[name]))


def write(
    matrices: Sequence[Matrix],
    name: str,
    values: Sequence[Tensor],
    active: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Stores fp32 values, which may be changed, rounded at random where there are seeds, one for each matrix.

    `active`: (B,) bool on the device; where it is False everything stays.
    """
    stored = [matrix[name] for matrix in matrices]
    if not is_coded(matrices[0].state, name):
        for i, (old, new) in enumerate(zip(stored, values, strict=True)):
            draws = F.generator(old, seeds[i] if seeds else None)
            F.store(old, new if active is None else torch.where(active[i], new, old), draws)
        return
    scales, ops = [matrix[name + SCALE] for matrix in matrices], operations(matrices[0].parameter)
    if ops is not F:
        ops.encode(torch.stack(list(values)), stored, scales, CODES[name], active, seeds)
        return
    both = zip((stored, scales), encode(torch.stack(list(values)), CODES[name], seeds), strict=True)
    for olds, coded in both:
        new = coded if active is None else torch.where(active.view(-1, 1, 1), coded, torch.stack(olds))
        torch._foreach_copy_(olds, list(new))


def update_moments(
    matrices: Sequence[Matrix], group: dict[str, Any], R: Tensor, active: Tensor | None, add: F.Add
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.direction` of matrices of one shape, whose low-rank moments are updated as they are kept."""
    base, state, ops = group["base_optimizer"], matrices[0].state, operations(matrices[0].parameter)
    names, seeds = list(F.MOMENTS[base]), None
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
            write(matrices, name, moments[i], active, seeds[i] if seeds else None)
    return found


@functools.cache
def _order(blocks: int, seed: int) -> list[int]:
    """The order in which blocks of columns take turns."""
    order: list[int] = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def matrices_of(p: Any, states: Mapping[Any, dict[str, Any]], group: dict[str, Any]) -> list[Matrix]:
    """The matrices of a parameter, all with its one state, which is empty before the first of them begins."""
    split, transposed, convolution = of_layout(group)
    state: Any = states.get(p) or State()
    shape, shards = F.folded_shape(p.shape, convolution), shards_of(p, split, transposed, convolution)
    weight, grad = int8.view(local(p.detach())), local(p.grad)
    if convolution:
        follow_layout(p, state, group)
        # A gradient that lies otherwise than its weight is copied, so that both have their columns in one order.
        channels_last = bool(F.is_channels_last(weight))
        weight, grad = F.folded(weight, channels_last), F.folded(grad, channels_last)
    if shards is not None:
        return [Matrix(p, state, None, 0, shards, weight, grad, shape)]
    weights, grads = F.parts(weight, split, transposed), F.parts(grad, split, transposed)
    if not F.stacked(shape, split):
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
            lie = (shape[0] >= shape[1], *(matrix.tall(x).stride() for x in (matrix.weight, matrix.grad)))
        kind = (int8.is_int8(local(p.data)), p.dtype, p.grad.dtype, matrix.shards, lie)
        alike[max(shape), min(shape), p.device, kind].append(matrix)
    for (long, short, device, _), members in alike.items():
        size = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // (long * min(rank, short)))
        for i in range(0, len(members), size):
            yield members[i : i + size]


def seed_of(state: dict[str, Any], *numbers: int) -> int:
    """A seed for one draw, from that of the parameter and the numbers that tell the draw from its others."""
    seed = state["seed"]
    for number in numbers:  # steps of Knuth's MMIX generator
        seed = ((seed + number) * 6364136223846793005 + 1442695040888963407) % 2**63
    return int(seed)


def rounds_state(group: dict[str, Any]) -> bool:
    """Whether moments are rounded at random."""
    return bool(group["state_dtype"] != "float32")


def rounds_weight(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the weight is rounded at random; int8 always is, or most updates would be lost."""
    return bool(group["stochastic_rounding"] and p.dtype == torch.bfloat16) or int8.is_int8(local(p.data))


def rounding_seed(state: dict[str, Any], place: int = 0, use: int = 0) -> int:
    """The seed of one rounding of a matrix in this step; `use` tells apart what is rounded within a step."""
    return seed_of(state, place, state["calls"], use)


def operations(p: Tensor) -> Any:
    """The module that makes the steps of such a weight: `functional`, or `kernels` where Triton can run them and the
    environment does not say FIRA_HF_TRITON=0."""
    return _operations(p.device.type)


def operations_of_moments(ops: Any) -> tuple[Any, Any]:
    """What reads and what writes whole moments where `ops` are the `operations`: `project` and `apply_updates` of
    `whole`, or the kernels of these."""
    return (whole.project, whole.apply_updates) if ops is F else (ops.project_moments, ops.apply_moment_updates)


def updates_of_int8(ops: Any) -> Any:
    """What updates int8 weights where `ops` are the `operations`."""
    return int8.apply_updates if ops is F else ops.apply_int8_updates


@functools.cache
def _operations(device: str) -> Any:
    if os.environ.get("FIRA_HF_TRITON") == "0":
        return F
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    # Products of bf16 on tensor cores need compute capability 8.0. ROCm has not been tried.
    can_run = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0)
    if device != "cuda" or not (is_interpreted or can_run) or importlib.util.find_spec("triton") is None:
        return F
    from . import kernels

    return kernels
