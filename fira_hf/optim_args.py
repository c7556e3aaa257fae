"""`optim_args` of `transformers.TrainingArguments`: a word, a list or a mapping -> settings of `FiraConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .config import FiraConfig, unknown_name, with_preset


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


# The settings that fit into a word, by the types of `FiraConfig`, and what stands for several of them.
TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _true_or_false}
# Settings that TrainingArguments carries already: FiraConfig's name -> theirs.
TRAINER_ARGS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_TYPE_OF = {one.name: str(one.type) for one in dataclasses.fields(FiraConfig) if one.name not in TRAINER_ARGS}
MAY_BE_NONE = {name for name, kind in _TYPE_OF.items() if kind.endswith(" | None")}
OPTIM_ARGS: dict[str, Callable[[str], Any]] = {
    **{name: TYPES[bare] for name, kind in _TYPE_OF.items() if (bare := kind.removesuffix(" | None")) in TYPES},
    "config": str,
    "preset": str,
}
KINDS: dict[Any, str] = {int: "an integer", float: "a number", _true_or_false: "true or false"}


def parse_optim_args(given: Any) -> dict[str, Any]:
    """`"rank=128, alpha=0.25"`, a list of such texts, or a mapping -> typed settings.

    `preset=NAME` stands for those of `fira_hf.config.PRESETS`. Values of a mapping that are no text are left to
    `FiraConfig`.

    Raises:
        ValueError: an entry is not `key=value`, a key is unknown or given twice, or a value is not of its type.
    """
    settings: dict[str, Any] = {}
    for name, value in _entries(given):
        if name in TRAINER_ARGS:
            raise ValueError(f"optim_args: set {name} by TrainingArguments' {TRAINER_ARGS[name]}, not here.")
        if name == "target_modules":
            raise ValueError("optim_args: set target_modules by TrainingArguments' optim_target_modules, not here.")
        if name not in OPTIM_ARGS and name in FiraConfig.__dataclass_fields__:
            raise ValueError(f"optim_args: {name} does not fit into one word: save a FiraConfig and say config=PATH.")
        if name not in OPTIM_ARGS:
            raise ValueError(f"optim_args={given!r}: {unknown_name('key', name, list(OPTIM_ARGS))}")
        if name in settings:
            raise ValueError(f"optim_args={given!r}: {name} is given twice.")
        kind = OPTIM_ARGS[name]
        try:
            is_none = str(value).lower() == "none" and name in MAY_BE_NONE
            is_typed = kind is not str and not isinstance(value, str)
            settings[name] = None if is_none else value if is_typed else kind(value)
        except ValueError:
            raise ValueError(f"optim_args={given!r}: {name}={value!r} is not {KINDS[kind]}.") from None
    found = with_preset(settings, f"optim_args={given!r}")
    if "preset" in settings and "config" in settings:
        raise ValueError(
            f"optim_args={given!r}: preset and config exclude each other: write the preset into the file."
        )
    return found


def _entries(given: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of each entry of `optim_args`, as given."""
    if isinstance(given, Mapping):
        yield from ((str(name), value) for name, value in given.items())
        return
    texts = [given or ""] if given is None or isinstance(given, str) else given
    if not isinstance(texts, Sequence):
        raise ValueError(
            f"optim_args={given!r} is not valid: it must be text such as 'rank=128, alpha=0.25', a list of such "
            "texts, or a mapping."
        )
    for text in texts:
        for entry in str(text).split(",") if str(text).strip() else []:
            name, equals, value = (part.strip() for part in entry.partition("="))
            if not (name and equals and value):
                raise ValueError(f"optim_args={given!r}: {entry.strip()!r} is not of the form key=value.")
            yield name, value
