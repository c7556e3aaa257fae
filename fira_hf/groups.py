"""What a parameter group may hold, and which weights: asked when the group comes, and of its weights at every step."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from . import views
from .config import OF_PEERS, PROJECTED_DEFAULTS, SHARED_DEFAULTS, unknown_name
from .distributed import local
from .int8 import is_int8
from .rules import PACKED, check_update, normalised
from .state import DTYPES
from .whole import GROUP

ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay")
GENERAL = (*ADAM_SETTINGS, *SHARED_DEFAULTS)
VALID = (*GENERAL, "rank", *PROJECTED_DEFAULTS)

# What torch itself and its schedulers write into groups.
OF_TORCH = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
# Further settings of torch's AdamW, which FiraAdamW has not. At these values they mean nothing; torch, or code that is
# written for AdamW, may have put them into a group.
OF_ADAMW = {k: v for k, v in torch.optim.AdamW([torch.zeros(1)]).defaults.items() if k not in ADAM_SETTINGS}


def check_group(group: dict[str, Any]) -> None:
    """Fills in the defaults of a group.

    Raises:
        ValueError: see `check_settings`; or a weight is none for this group.
    """
    check_settings(group)
    for p in group["params"]:
        check_weight(p, group)


def watched(group: dict[str, Any]) -> dict[str, Any]:
    """What is checked again where somebody has edited it. Adam's own settings change by schedules, and always are.

    With the types: 1.0 of numpy equals 1.0, and a checkpoint that holds it cannot be loaded."""
    names = group.keys() - OF_TORCH - set(ADAM_SETTINGS)
    return {name: (type(group[name]), group[name]) for name in names}


def check_rates(group: dict[str, Any]) -> None:
    """Raises ValueError if one of Adam's settings, which schedules set, is not valid now."""
    for name in ADAM_SETTINGS:
        group[name] = normalised(name, 0.0 if name == "lr" and is_rounding(group[name]) else group[name])
    group["betas"] = tuple(group["betas"])


def is_rounding(lr: Any) -> bool:
    """Whether a rate is below zero by rounding alone, as torch's LinearLR ends where it ends at zero."""
    return isinstance(lr, float) and -1e-12 < lr < 0


def check_settings(group: dict[str, Any]) -> None:
    """Fills in the defaults of a group, whatever its weights are.

    Raises:
        ValueError: a setting is unknown, not valid or without effect. A key that resembles no setting may be another
            library's, and stays.
    """
    for name in sorted(group.keys() - OF_TORCH):
        if name not in VALID:
            _check_unknown(name, group[name])
        elif "rank" not in group and name not in GENERAL:
            raise ValueError(f"Parameter group: {name}={group[name]!r} has no effect in a group without 'rank'.")
    for name in VALID if "rank" in group else GENERAL:
        group[name] = normalised(name, group.get(name, {**SHARED_DEFAULTS, **PROJECTED_DEFAULTS}.get(name)))
    if "rank" in group:
        check_update(group)
        if group["convolution"] and group["transposed"]:
            raise ValueError(
                "Parameter group: transposed=True does not go with convolution=True: leave it out. Of a transposed "
                "convolution, too, the first dimension is the rows of the matrix."
            )
    group["betas"] = tuple(group["betas"])


def _check_unknown(name: str, value: Any) -> None:
    if name in OF_ADAMW:
        check_of_adamw(name, value, "Parameter group")
    elif name in OF_PEERS or difflib.get_close_matches(name, VALID, n=1):
        raise ValueError(f"Parameter group: {unknown_name('setting', name, list(VALID))}")


def check_of_adamw(name: str, value: Any, where: str) -> None:
    """Raises ValueError if a setting that only torch's AdamW has asks for something."""
    default = OF_ADAMW[name]
    if value != default and not (default is None and value is False):
        raise ValueError(
            f"{where}: {name}={value!r} is a setting of torch's AdamW that FiraAdamW has not: leave it out."
        )


def dimensions_of(group: dict[str, Any]) -> tuple[int, ...]:
    """How many dimensions a weight of a projected group may have."""
    return (3, 4, 5) if group["convolution"] else (2, 3)


def check_weight(p: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError if this group cannot train the weight as it is now."""
    if p.dtype not in DTYPES and p.requires_grad:
        raise ValueError(
            f"Parameter group: {name_of(p, group)} is of dtype {p.dtype}, but FiraAdamW trains only "
            f"{', '.join(map(str, DTYPES))}: convert the model."
        )
    if group["stochastic_rounding"] and p.dtype == torch.float16:
        raise ValueError(
            f"Parameter group: stochastic_rounding=True is for bf16 weights, but {name_of(p, group)} is of fp16: "
            "convert the model to bf16, or leave it out."
        )
    if "rank" not in group:
        return
    if p.ndim not in dimensions_of(group):
        if group["convolution"]:
            what = "is no weight of a convolution (out, in, *kernel): put it into a group without 'convolution'."
        else:
            way = "put it into a group without 'rank'"
            way += ", or set convolution=True if it is that of a convolution" if p.ndim in (4, 5) else ""
            what = f"cannot be projected, only matrices and stacks of them (3-D) can: {way}."
        raise ValueError(f"Parameter group: {name_of(p, group)} of shape {tuple(p.shape)} {what}")
    if group["convolution"] and views.is_channels_last(local(p.data)) is None:
        raise ValueError(
            f"Parameter group: {name_of(p, group)} of shape {tuple(p.shape)} lies in memory with strides "
            f"{local(p.data).stride()}, neither contiguous nor channels_last, so that no view of it is a matrix: set "
            "p.data = p.data.contiguous()."
        )
    shape = views.folded_shape(p.shape, group["convolution"])
    if shape[-1 if group["transposed"] else -2] % group["split"]:
        raise ValueError(
            f"Parameter group: split={group['split']} does not divide the output dimension of {name_of(p, group)}, of "
            f"shape {tuple(p.shape)}: only equal parts can be projected by themselves."
        )
    if group["residual"] == "moment" and is_int8(local(p.data)):
        raise ValueError(
            f"Parameter group: residual='moment' trains no int8 weights, but {name_of(p, group)} is one: leave "
            "that setting or preset out, or the weight unquantised (filter_fn of quantize_)."
        )
    is_packed = group["residual"] == "moment" and group["state_dtype"] in PACKED
    if is_packed and group["transposed"] and group["split"] > 1 and p.shape[-1] // group["split"] % GROUP:
        raise ValueError(
            f"Parameter group: split={group['split']} of {name_of(p, group)}, of shape {tuple(p.shape)} and stored "
            f"transposed, gives parts whose width is no multiple of {GROUP}, so that codes of "
            f"state_dtype={group['state_dtype']!r} would belong to two: set state_dtype='bfloat16' or no split."
        )


def name_of(p: Tensor, group: dict[str, Any]) -> str:
    """What to call a weight of the group in an error."""
    index = next(i for i, other in enumerate(group["params"]) if other is p)
    names = group.get("param_names", [])
    return names[index] if index < len(names) else f"parameter {index} of its group"


def name_parameters(group: dict[str, Any], first: int) -> None:
    """Gives the parameters of a group names, where they have none, by their places among all, from `first` on."""
    params = group["params"]
    if "param_names" in group or isinstance(params, set):  # which torch refuses
        return
    params = [params] if isinstance(params, Tensor) else list(params)
    named = enumerate(params, first)
    group["params"] = [p if isinstance(p, tuple) else (f"parameter {i}", p) for i, p in named]
