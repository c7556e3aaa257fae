"""The rule of every setting, of a `FiraConfig` as of a parameter group; it is stated here, and nowhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

# state_dtype of moments as codes with scales ("int8": bases, too); what else a state holds is then bfloat16.
PACKED = ("int8", "int4")
# What residual="moment" needs: rows of one norm, a moment that is in no basis, a basis of what is largest of it.
MOMENT_NEEDS = {"base_optimizer": "muon", "scaling": "column", "moments": "rotated", "projection": "power"}

Check = Callable[[Any], bool]


def plain(value: Any) -> Any:
    """Numbers, sequences and mappings of any library as Python's own; what is none of these as it is.

    A number may be an array or tensor of one element; one of more is a list.
    """
    if hasattr(value, "tolist"):  # what numpy and torch have, and all that is like theirs
        try:
            value = value.tolist()
        except RuntimeError:  # on the meta device there are no values
            return value
        while isinstance(value, list) and len(value) == 1 and not isinstance(value[0], str):
            value = value[0]
    if isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (Real, Decimal)):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return list(map(plain, value)) if isinstance(value, Sequence) else value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    # Of integers, too, that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_names(value: Any) -> bool:
    """A regex, or a non-empty list of module names."""
    if isinstance(value, str):
        return bool(value) and _is_regex(value)
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_pattern(value: Any, is_valid: Check) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) and _is_regex(key) and is_valid(number) for key, number in value.items())


def _is_positive_int(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_split(value: Any) -> bool:
    return _is_int(value) and value >= 2


def _is_alpha(value: Any) -> bool:
    return _is_real(value) and value > 0


def _is_at_least_0(value: Any) -> bool:
    return _is_real(value) and value >= 0


def _is_betas(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_real(b) and 0 <= b < 1 for b in value)


def _is_one_of(*choices: str) -> tuple[Check, str]:
    return (lambda value: value in choices), "one of " + ", ".join(map(repr, choices))


RULES: dict[str, tuple[Check, str]] = {
    "rank": (_is_positive_int, "an integer of at least 1"),
    "alpha": (_is_at_least_0, "a number of at least 0"),
    "update_proj_gap": (_is_positive_int, "an integer of at least 1"),
    "limiter": _is_one_of("growth", "shrink", "scale"),
    "gamma": (lambda v: v is None or _is_alpha(v), "a number above 0, or None for no limiter"),
    "projection": _is_one_of("svd", "power", "random", "columns"),
    "refresh": _is_one_of("together", "staggered"),
    "moments": _is_one_of("kept", "rotated"),
    "base_optimizer": _is_one_of("adamw", "lion", "adafactor", "muon"),
    "scaling": _is_one_of("column", "matrix", "none"),
    "residual": _is_one_of("reference", "paper", "none", "moment"),
    "adjust_lr": _is_one_of("match_rms_adamw", "none"),
    "state_dtype": _is_one_of("float32", "bfloat16", "int8", "int4"),
    "stochastic_rounding": (_is_bool, "True or False"),
    "target_modules": (
        lambda v: v == [] or _is_names(v),
        "'all-linear', 'all-linear-and-conv', a regular expression, or a list of module names (empty only beside "
        "target_parameters)",
    ),
    "target_parameters": (
        lambda v: v is None or (isinstance(v, list) and _is_names(v)),
        "a non-empty list of parameter names",
    ),
    "exclude_modules": (lambda v: v is None or _is_names(v), "a regular expression, or a non-empty list of names"),
    "layers_to_transform": (
        lambda v: v is None or _is_index(v) or (isinstance(v, list) and bool(v) and all(map(_is_index, v))),
        "a layer index of at least 0, or a non-empty list of them",
    ),
    "layers_pattern": (
        lambda v: v is None or (_is_names(v) and all(map(_is_regex, [v] if isinstance(v, str) else v))),
        "a name or regular expression, or a non-empty list of them",
    ),
    "rank_pattern": (lambda v: _is_pattern(v, _is_positive_int), "a dict from module name or regex to a rank"),
    "alpha_pattern": (lambda v: _is_pattern(v, _is_alpha), "a dict from module name or regex to an alpha above 0"),
    "split_pattern": (
        lambda v: _is_pattern(v, _is_split),
        "a dict from module name or regex to a number of parts, at least 2",
    ),
    "split": (_is_positive_int, "an integer of at least 1"),
    "transposed": (_is_bool, "True or False"),
    "convolution": (_is_bool, "True or False"),
    "lr": (_is_at_least_0, "a number of at least 0"),
    "betas": (_is_betas, "two numbers in [0, 1)"),
    "eps": (_is_at_least_0, "a number of at least 0"),
    "correct_bias": (_is_bool, "True or False"),
    "weight_decay": (_is_at_least_0, "a number of at least 0"),
    "dense_lr": (lambda v: v is None or _is_at_least_0(v), "a number of at least 0, or None for the same lr"),
}


def normalised(name: str, value: Any) -> Any:
    """The value as it is kept: `plain`, so that files, checkpoints and schedules find Python's own types.

    Raises:
        ValueError: naming the setting, its value and the rule, if `value` is not valid for `name`.
    """
    is_valid, rule = RULES[name]
    kept = plain(value)
    if not is_valid(kept):
        raise ValueError(f"{name}={value!r} is not valid: {name} must be {rule}.")
    return kept


def check_update(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the settings, where valid ones of a projected group contradict each other."""
    alpha, residual, limiter, gamma = (settings[name] for name in ("alpha", "residual", "limiter", "gamma"))
    for name, value in MOMENT_NEEDS.items() if residual == "moment" else ():
        if settings[name] != value:
            raise ValueError(
                f"{name}={settings[name]!r} does not go with residual='moment', which takes {name}={value!r}: set "
                "that, as the presets subspace-muon and muon-4bit do, or choose another residual."
            )
    if residual != "moment" and settings["state_dtype"] == "int4":
        raise ValueError(
            f"state_dtype='int4' is for the whole moment of residual='moment', not for residual={residual!r}: set "
            "state_dtype='int8', or take the preset subspace-muon."
        )
    if alpha == 0 and residual in ("paper", "none", "moment"):
        raise ValueError(
            f"alpha=0 with residual={residual!r} would update nothing: set an alpha above 0, or residual='reference', "
            "which then applies the scaled gradient alone."
        )
    if gamma is not None and (gamma < 1 if limiter == "growth" else gamma > 1):
        rule = (
            "at least 1, the largest growth" if limiter == "growth" else "at most 1, the share of the norm that stays"
        )
        raise ValueError(f"gamma={gamma!r} is not valid for limiter={limiter!r}: it must be {rule}.")
