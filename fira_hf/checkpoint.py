"""Whether a saved state fits an optimizer: asked before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from .config import PROJECTED_DEFAULTS, SHARED_DEFAULTS, FiraConfig, plain_name
from .groups import OF_ADAMW, check_of_adamw, name_of
from .state import state_misfit

logger = logging.getLogger(__name__)

# How torch's AdamW makes its step, which changes nothing in what a checkpoint holds.
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


def check_checkpoint(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Compares names without what wrappers add to them, settings, and the shapes of all tensors.

    Adam's settings may differ, as everywhere in torch; a difference is logged as a warning, but for betas that a
    schedule cycles.

    Raises:
        ValueError: the state dict was made by an optimizer that projects other weights, or projects otherwise, or one
            of its states is not whole or not that of its weight.
    """
    missing = [name for name in ("state", "param_groups") if name not in state_dict]
    if missing:
        raise ValueError(
            f"This is no state of an optimizer: it has no {' and no '.join(missing)}, only {sorted(state_dict)[:5]}."
        )
    saved_groups = state_dict["param_groups"]
    for group in saved_groups:
        for name in (OF_ADAMW.keys() - IMPLEMENTATION) & group.keys():
            check_of_adamw(name, group[name], "The checkpoint")
    _check_projections(saved_groups, param_groups)
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        return  # which torch refuses in its own words
    groups = [group for group in param_groups for _ in group["params"]]
    for (index, p), group in zip(pairs(state_dict, param_groups), groups, strict=True):
        problem = state_misfit(p, state_dict["state"].get(index, {}), group, elsewhere=True)
        if problem is not None:
            raise ValueError(
                f"The checkpoint cannot be loaded: {name_of(p, group)} of shape {tuple(p.shape)} {problem}. Resume "
                "with the model that the checkpoint was made with."
            )
    _log_differences(saved_groups, param_groups)


# torch compares no names, and goes by the order; so does this optimizer where the names are not there.
RENAMED = (
    " Where the weights only have new names, remove 'param_names' from the groups of the state dict before it is "
    "loaded: then they are taken in their order."
)
OTHERS = " Train the same weights as the checkpoint did, or start a new run from the weights."


def _check_projections(saved_groups: list[dict[str, Any]], param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless both project the same weights, with the same settings and in the same order."""
    if any("rank" in group for group in param_groups) and not any("rank" in group for group in saved_groups):
        raise ValueError(
            "The checkpoint's optimizer state is not Fira's: no weight is projected in it. To go on from its weights, "
            "load the model from the checkpoint and start a new run, without the state of the optimizer (in the "
            "Trainer, without resume_from_checkpoint)."
        )
    named = all("param_names" in group for group in [*saved_groups, *param_groups])
    saved, own = _projected(saved_groups, named), _projected(param_groups, named)
    sides = (("The checkpoint", "this optimizer", saved, own), ("This optimizer", "the checkpoint", own, saved))
    for one, other, names, known in sides:
        extra = sorted(names.keys() - known.keys())
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            raise ValueError(
                f"{one} projects {', '.join(extra[:3])}{more}, which {other} does not: resume with the same "
                "target modules, or start a new run from the weights."
                + (RENAMED if named and len(saved) == len(own) else "")
            )
    for name, settings in own.items():
        for setting, value in settings.items():
            was = saved[name].get(setting)
            if was != value:
                raise ValueError(
                    f"The checkpoint was made with {setting}={was!r} for {name}, this optimizer has "
                    f"{setting}={value!r}: resume with {setting}={was!r}, or start a new run from the weights."
                )
    if not named:
        return
    order, own_order = ([n for group in groups for n in _names(group)] for groups in (saved_groups, param_groups))
    if order != own_order and sorted(order) == sorted(own_order):
        raise ValueError(
            "The checkpoint has the same weights in another order or in other groups: build the optimizer as it was "
            "built for the checkpoint."
        )
    for old, new in zip(order, own_order, strict=False):
        if old != new:
            way = RENAMED if len(order) == len(own_order) else OTHERS
            raise ValueError(f"The checkpoint has {old} where this optimizer trains {new}.{way}")


def _log_differences(saved_groups: list[dict[str, Any]], param_groups: list[dict[str, Any]]) -> None:
    seen = set()
    for old, new in zip(saved_groups, param_groups, strict=True):
        # What a schedule of torch makes of the rate changes from step to step, what it began with does not.
        rate = "initial_lr" if "initial_lr" in {**old, **new} else "lr"
        for setting in (rate, "betas", "eps", "weight_decay", *SHARED_DEFAULTS):
            if setting == "betas" and "max_momentum" in old:
                continue  # OneCycleLR and CyclicLR set them anew at every step
            was, now = (group.get(setting) for group in (old, new))
            was = tuple(was) if isinstance(was, list) else was  # what was sent or written as JSON has no tuples
            if setting in old and setting in new and was != now and (setting, was, now) not in seen:
                seen.add((setting, was, now))
                name = "lr" if setting == rate else setting
                logger.warning(
                    "%s=%s of the checkpoint replaces %s. For the latter, start a new run from its weights.",
                    name,
                    was,
                    now,
                )


def config_in_effect(config: FiraConfig, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> FiraConfig:
    """The config with Adam's settings as a checkpoint has set them in the groups, which were as `before`.

    The first group that had the config's value tells; one with a value of its own says nothing of the others, nor does
    a momentum that a schedule moves up and down.
    """
    pairs = list(zip(before, now, strict=True))

    def told(name: str, value: Any, groups: list[Any], otherwise: Any) -> Any:
        told_by = (pair for pair in groups if name != "betas" or "max_momentum" not in {**pair[0], **pair[1]})
        return next((_begun_with(new, name) for old, new in told_by if _begun_with(old, name) == value), otherwise)

    own = {name: getattr(config, name) for name in ("betas", "eps", "weight_decay")}
    lr = told("lr", config.lr, [pair for pair in pairs if "rank" in pair[0]], config.lr)
    dense_lr = config.lr if config.dense_lr is None else config.dense_lr
    dense_lr = told("lr", dense_lr, [pair for pair in pairs if "rank" not in pair[0]], config.dense_lr)
    return replace(
        config,
        lr=lr,
        dense_lr=None if dense_lr == lr else dense_lr,
        **{name: told(name, value, pairs, value) for name, value in own.items()},
    )


def _begun_with(group: dict[str, Any], name: str) -> Any:
    """A setting of a group; of the rate, which a schedule changes from step to step, what it began with."""
    return group.get("initial_lr", group["lr"]) if name == "lr" else group[name]


def _names(group: dict[str, Any]) -> list[str]:
    return [plain_name(name) for name in group["param_names"]]


def pairs(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> list[tuple[int, Tensor]]:
    """Index in the state dict and parameter here, for each; torch refuses another number of them by itself."""
    saved = (index for group in state_dict["param_groups"] for index in group["params"])
    own = (p for group in param_groups for p in group["params"])
    return list(zip(saved, own, strict=False))


def _projected(groups: list[dict[str, Any]], named: bool) -> dict[str, dict[str, Any]]:
    """Name (or position) of each projected parameter -> the settings of its projection."""
    found: dict[str, dict[str, Any]] = {}
    for g, group in enumerate(groups):
        if "rank" not in group:
            continue
        settings = {name: group.get(name) for name in ("rank", *PROJECTED_DEFAULTS, *SHARED_DEFAULTS)}
        names = _names(group) if named else [f"parameter {i} of group {g}" for i in range(len(group["params"]))]
        found |= dict.fromkeys(names, settings)
    return found
