"""Whether a saved state fits an optimizer: asked before anything is loaded."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from .config import PROJECTED_DEFAULTS, SHARED_DEFAULTS
from .functional import long_and_short, stacked

logger = logging.getLogger(__name__)


def check_checkpoint(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if a state dict was made by an optimizer that projects other weights, or projects otherwise.

    Adam's settings may differ, as everywhere in torch; a difference is logged as a warning.
    """
    saved_groups = state_dict["param_groups"]
    named = all("param_names" in group for group in [*saved_groups, *param_groups])
    saved, own = _projected(saved_groups, named), _projected(param_groups, named)
    if named and saved.keys() == own.keys():
        for old, new in zip(saved_groups, param_groups, strict=False):
            if len(old["params"]) == len(new["params"]) and old["param_names"] != new["param_names"]:
                raise ValueError(
                    "The checkpoint has the same weights in another order or in other groups: build the optimizer "
                    "as it was built for the checkpoint."
                )
    sides = (("The checkpoint", "this optimizer", saved, own), ("This optimizer", "the checkpoint", own, saved))
    for one, other, names, known in sides:
        extra = sorted(names.keys() - known.keys())
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            raise ValueError(
                f"{one} projects {', '.join(extra[:3])}{more}, which {other} does not: resume with the same "
                "target modules, or start a new run from the weights."
            )
    for name, settings in own.items():
        for setting, value in settings.items():
            was = saved[name].get(setting)
            if was != value:
                raise ValueError(
                    f"The checkpoint was made with {setting}={was!r} for {name}, this optimizer has "
                    f"{setting}={value!r}: resume with {setting}={was!r}, or start a new run from the weights."
                )
    groups = [group for group in param_groups for _ in group["params"]]
    for (index, p), group in zip(pairs(state_dict, param_groups), groups, strict=False):
        state = state_dict["state"].get(index, {})
        expected, shape = tuple(p.shape), tuple(state.get("exp_avg", p).shape)
        if "basis" in state:
            expected = (*stacked(p, group["split"]), *long_and_short(p, group["split"], group["transposed"]))
            shape = (*shape[:-1], state["basis"].shape[-2])
        if shape != expected:
            raise ValueError(
                f"The checkpoint holds the state of a weight of another shape than this model's {tuple(p.shape)}: "
                "resume with the model that it was made with."
            )
    for old, new in zip(saved_groups, param_groups, strict=False):
        for setting in ("initial_lr", "betas", "eps", "weight_decay"):
            was, now = (group.get(setting) for group in (old, new))
            was = tuple(was) if isinstance(was, list) else was  # what was sent or written as JSON has no tuples
            if setting in old and setting in new and was != now:
                logger.warning("%s=%s of the checkpoint replaces %s.", setting, was, now)


def pairs(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> list[tuple[int, Tensor]]:
    """Index in the state dict and parameter here, for each; torch refuses another number of them by itself."""
    saved = (index for group in state_dict["param_groups"] for index in group["params"])
    own = (p for group in param_groups for p in group["params"])
    return list(zip(saved, own, strict=False))


def _projected(groups: list[dict[str, Any]], named: bool) -> dict[str, dict[str, Any]]:
    """Name (or position) of each projected parameter -> the settings of its projection."""
    return {
        group["param_names"][i] if named else f"parameter {i} of group {g}": {
            name: group.get(name) for name in ("rank", *PROJECTED_DEFAULTS, *SHARED_DEFAULTS)
        }
        for g, group in enumerate(groups)
        if "rank" in group
        for i in range(len(group["params"]))
    }
