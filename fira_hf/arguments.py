"""`transformers.TrainingArguments` -> `FiraConfig`: `optim_args`, `optim_target_modules` and Adam's settings."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from .config import ALL_LINEAR, WORDS, FiraConfig, plain_name, unknown_name, with_preset, word_or_regex
from .layers import Layer, target_layers, weights
from .rules import normalised, plain
from .targets import find_targets, other_than_linear, scoped, unmatched


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
# To a group of an expression, by its number or name: in a longer expression it would be another group.
REFERENCE = re.compile(r"\\[1-9]|\(\?P|\(\?\(")
KINDS: dict[Any, str] = {int: "an integer", float: "a number", _true_or_false: "true or false"}


def config_from_args(args: TrainingArguments, model: nn.Module) -> FiraConfig:
    """The `FiraConfig` that the training arguments describe.

    Raises:
        ValueError: a key or value of `optim_args` is unknown or malformed, a target matches no trainable linear layer,
            or a configuration file contradicts the training arguments.
    """
    settings = parse_optim_args(args.optim_args)
    path = settings.pop("config", None)
    file = FiraConfig() if path is None else FiraConfig.from_pretrained(path)
    own: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    defaults = FiraConfig()
    for name, value in own.items():
        try:
            normalised(name, value)
        except ValueError as error:
            raise ValueError(f"TrainingArguments' {TRAINER_ARGS[name]}: {error}") from None
        said = getattr(file, name)
        if said not in (getattr(defaults, name), value):
            raise ValueError(
                f"{path!r} says {name}={said!r}, but TrainingArguments says {TRAINER_ARGS[name]}={value!r}: make them "
                f"equal, or take {name} out of the file."
            )
    config = replace(file, **own, **settings)
    targets = args.optim_target_modules
    if targets is None:
        return config
    is_word = isinstance(targets, str) and word_or_regex(targets) in WORDS
    if not is_word and file.layers_to_transform is not None:
        raise ValueError(
            f"{path!r} sets layers_to_transform={file.layers_to_transform!r}, which counts layers of its own "
            "target_modules: take it out of the file, or leave optim_target_modules unset."
        )
    chosen = replace(config, target_modules=targets if is_word else _trainer_targets(model, targets))
    if file.target_modules != ALL_LINEAR:
        names, said = ({target.name for target in find_targets(model, c).projected} for c in (chosen, config))
        if names != said:
            raise ValueError(
                f"optim_target_modules={targets!r} and target_modules={file.target_modules!r} of {path!r} choose "
                "different weights: set one of them."
            )
    return chosen


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
            more = " Commas separate the entries." if re.search(r"\s|;", str(value)) else ""
            raise ValueError(f"optim_args={given!r}: {name}={value!r} is not {KINDS[kind]}.{more}") from None
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


def _trainer_targets(model: nn.Module, targets: Any) -> str:
    """The Trainer's rule as a regular expression for the full name, which is what `FiraConfig` understands.

    A string is one already. An entry of a list is a part of the name, or a regular expression for all of it.
    """
    targets = plain(targets)
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(entry, str) and entry for entry in names):
        raise ValueError(
            f"optim_target_modules={targets!r} must be {', '.join(map(repr, WORDS))}, a regular expression, or a list "
            "of names."
        )
    layers = target_layers(model)
    for entry in names:
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(
                f"optim_target_modules: {entry!r} is no regular expression ({error}): write a part of the name as it "
                "is, or a valid expression for all of it."
            ) from None
        probe = entry if isinstance(targets, str) else [entry]
        found = [layer for layer in layers if check_target_module_exists(probe, plain_name(layer.name))]
        if not any(layer.weight.requires_grad for layer in found):
            why = "matches only frozen weights" if found else "matches no linear layer or convolution"
            matched = functools.partial(check_target_module_exists, probe)
            setting = "target_parameters of a FiraConfig (config=PATH)"
            if hint := other_than_linear(weights(model), matched, setting):
                raise ValueError(f"optim_target_modules: {entry!r} {why}, but {hint}.")
            raise unmatched("optim_target_modules", probe, why, layers)
    if isinstance(targets, str):
        return targets
    parts = [rf".*{re.escape(entry)}.*" for entry in targets]
    parts += [_alternative(entry, layers) for entry in targets if re.escape(entry) != entry]
    return "|".join(filter(None, parts))


def _alternative(entry: str, layers: list[Layer]) -> str:
    """A regular expression as one of several, in which it matches what it does alone; empty where that is nothing."""
    if not REFERENCE.search(entry):
        return scoped(entry)
    names = [plain_name(layer.name) for layer in layers if any(re.fullmatch(entry, n) for n in layer.aliases)]
    return "|".join(map(re.escape, names))
