"""What is kept for each weight: names, shapes and dtypes, how it is created, loaded and checked, and its seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from . import functional as F
from . import int8, views, whole
from .base_optimizers import MOMENTS
from .codes import CODES, SCALE
from .distributed import local, own_of_stack, sharded_like, shards_of
from .rules import PACKED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and gradients

# What is rounded at random in a step, as `use` of a seed: 0 is the weight; then the moments by number, in the update
# and in a change of basis before it.
OF_MOMENTS, OF_REFRESH = 1, 4


class State(dict[str, Any]):
    """The state of a projected parameter: its entries are saved, its attributes are not.

    refresh_in: calls of `step()` that can pass before the basis may be due; None for a matrix that has no basis yet. A
    list of these for a stack, or a matrix in parts. interval: the `update_proj_gap` by which that was counted.
    made_with: `OF_SHAPES` of the group that it was made for.
    """

    refresh_in: Any = None
    interval: int | None = None
    made_with: tuple[Any, ...] | None = None

    @property
    def begun(self) -> bool:
        """Whether a matrix of it has a basis."""
        places = self.refresh_in if isinstance(self.refresh_in, list) else [self.refresh_in]
        return any(place is not None for place in places)

    def belongs_to(self, group: Mapping[str, Any]) -> None:
        """Notes by which settings it was made."""
        self.interval, self.made_with = group["update_proj_gap"], of_shapes(group)

    def follow_interval(self, group: Mapping[str, Any]) -> None:
        """Where the interval has changed, bases may be due before they were thought to be: the next call looks. Which
        columns have their turn changes at once, and moments of others have no part in them."""
        if self.interval in (None, group["update_proj_gap"]):
            return
        self.interval, places = group["update_proj_gap"], self.refresh_in
        if group["projection"] == "columns" and group["moments"] == "rotated":
            self.forget(group)
        if isinstance(places, list):
            self.refresh_in = [None if place is None else 0 for place in places]
        elif places is not None:
            self.refresh_in = 0

    def forget(self, group: Mapping[str, Any]) -> None:
        """Sets the moments to zero, and the count of updates by which their bias is corrected; of all its matrices."""
        for name in (*low_rank_moments(group), "step"):
            local(self[name]).zero_()  # codes of zero are zero, whatever their scale


def first_states(param_groups: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Parameter -> the plain numbers that its state begins with, from its place among all parameters.

    seed: for what is drawn at random. phase: the update, counted from 0, before which the basis is first refreshed,
    and then every `update_proj_gap`; staggered, so that each update has its share of the work.
    """
    first: dict[Any, dict[str, Any]] = {}
    for group in param_groups:
        for p in group["params"]:
            first[p] = {"seed": len(first), "calls": 0} | ({"phase": 0} if "rank" in group else {})
    staggered = [(p, group) for group in param_groups if group.get("refresh") == "staggered" for p in group["params"]]
    # Matrices of one shape are refreshed together, so those that are due at one update are of few shapes.
    staggered.sort(key=lambda one: tuple(one[0].shape))
    # Of matrices that have no elements, if there are no others, nothing is ever found.
    total = max(1, sum(p.numel() * group["rank"] for p, group in staggered))
    before = 0
    for p, group in staggered:
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
    """What there is of `base_optimizers.MOMENTS` in the state of a projected weight."""
    return {} if is_whole(group) else MOMENTS[group["base_optimizer"]]


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


def of_shapes(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in OF_SHAPES)


def kept_tensors(shape: Iterable[int], group: Mapping[str, Any]) -> dict[str, Kept]:
    """The tensors in the state of a projected weight of this shape, by name; `group` has all of `OF_SHAPES`."""
    return _kept_tensors(tuple(shape), *of_shapes(group))


@functools.cache
def _kept_tensors(shape: tuple[int, ...], *of_group: Any) -> dict[str, Kept]:
    group = dict(zip(OF_SHAPES, of_group, strict=True))
    split, transposed, convolution = of_layout(group)
    shape = views.folded_shape(torch.Size(shape), convolution)
    stack, (long, short) = views.stacked(shape, split), views.long_and_short(shape, split, transposed)
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
            kept[name + SCALE] = Kept((*outer, whole.scales_in(r)), torch.bfloat16, along)
    return {**kept, "step": Kept(stack, torch.float32), "residual_norm": Kept(stack, torch.float32)}


def expected(p: Any, group: Mapping[str, Any]) -> dict[str, Kept]:
    """The tensors in the state of a weight, projected or not, by name."""
    return kept_tensors(p.shape, group) if "rank" in group else _of_adamw(p.shape, group["state_dtype"])


@functools.cache
def _of_adamw(shape: torch.Size, state_dtype: str) -> dict[str, Kept]:
    moment = Kept(tuple(shape), state_dtype_of(state_dtype), "weight")
    return {**dict.fromkeys(MOMENTS["adamw"], moment), "step": Kept((), torch.float32)}


def create_state(p: Any, group: dict[str, Any], first: dict[str, Any]) -> State:
    """The state of a projected parameter, with no basis yet; `first` is its entry in `first_states`."""
    shards, device = shards_of(p, *of_layout(group)), local(p.data).device
    of_part, is_stack = kept_tensors(local(p.data).shape, group), p.ndim == 3 and not group["convolution"]
    state = State(first)
    state.belongs_to(group)
    if group["convolution"]:
        state["channels_last"] = views.is_channels_last(local(p.data))
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
    """A copy of a saved state on the weight's device, in the dtypes that its group's `state_dtype` says."""
    device, state, kept = local(p.data).device, State(), expected(p, group)
    for name, value in saved.items():
        if isinstance(value, Tensor):
            if value.is_floating_point() and name in kept:
                value = value.to(kept[name].dtype)
            is_basis = name == "basis" and value.is_floating_point()  # and no codes, which are decoded
            value = F.column_major(value.to(device)) if is_basis else value.to(device, copy=True)
            if "residual_norm" in saved and not is_basis:  # else as its weight lies
                value = value.contiguous()
        state[name] = value
    if "residual_norm" in state:
        state.belongs_to(group)
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
    channels_last = views.is_channels_last(local(p.data))
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
        state.forget(group)
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
    if not data.is_contiguous() and any(st == 0 and n > 1 for st, n in zip(data.stride(), data.shape, strict=True)):
        return "is expanded, so that several of its numbers are one in memory"
    if p.grad is None:
        return None
    grad = local(p.grad)
    if p.grad.shape != p.shape or grad.shape != data.shape:
        return f"has a gradient of another shape, {tuple(p.grad.shape)}"
    if grad.device != data.device or grad.layout != torch.strided or grad.dtype not in DTYPES:
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
            if "residual_norm" not in state:
                return "has the state of a weight that is not projected, and its group has a rank now"
            return (
                "has a state that was loaded past load_state_dict (with ZeroRedundancyOptimizer, let each process "
                "save optimizer.optim.state_dict() and load it by optimizer.optim.load_state_dict())"
            )
        made_with, said = getattr(state, "made_with", None), of_shapes(group)
        if made_with not in (None, said):
            changed = next(i for i, (old, new) in enumerate(zip(made_with, said, strict=True)) if old != new)
            return (
                f"has a state that was made with {OF_SHAPES[changed]}={made_with[changed]!r}, but its group says "
                f"{OF_SHAPES[changed]}={said[changed]!r} (set it back)"
            )
    device = local(p.data).device
    for name, kept in expected(p, group).items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            return f"has an optimizer state without {name}"
        if value.shape != kept.shape:
            shapes = f"{name} is {tuple(value.shape)}, not {tuple(kept.shape)}"
            return f"has the optimizer state of a weight of another shape ({shapes})"
        can_be_cast = elsewhere and value.is_floating_point() and kept.dtype.is_floating_point
        if value.dtype != kept.dtype and not can_be_cast:
            return (
                f"has {name} of its optimizer state in {value.dtype}, where state_dtype={group['state_dtype']!r} "
                f"keeps it in {kept.dtype}"
            )
        if not elsewhere and value.device != device:
            return (
                f"is on {device}, but {name} of its optimizer state on {value.device} (which moves by "
                "optimizer.load_state_dict(optimizer.state_dict()))"
            )
    if isinstance(p, DTensor) != isinstance(state["exp_avg"], DTensor):
        one, other = ("is", "is not") if isinstance(p, DTensor) else ("is not", "is")
        return f"{one} sharded, but its optimizer state {other}"
    return None


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
