"""What any recipe is told: a flat YAML file, and what the command line changes in it.

Nothing here imports torch, so that `compare` can read an experiment at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Where a run writes and how it is started do not change what it computes.
_NOT_COMPARED = {"output_dir", "dry_run", "disable_tqdm", "log_level"}
_DERIVED = {
    "report_to": "a run writes its figures into its own folder and logs in nowhere",
    "resume_from_checkpoint": "a run continues by itself from the last checkpoint in its folder",
}


BEFORE = "before training"  # in the place of a method: the model as it is


@dataclass(frozen=True)
class Method:
    """What defines a method: whether LoRA wraps the model, which optimizers it may use (the first by default), and
    whether the weights that LoRA wraps are in 4 bits.
    """

    lora: bool
    optimizers: tuple[str, ...]
    four_bits: bool = False


@dataclass(frozen=True)
class Recipe:
    """What tells one recipe from another.

    package: where its train.py and its experiments/ lie, as it is imported; paths: settings that name files;
    derived: settings of TrainingArguments that are not set in an experiment, and why; before: the settings on which
    the figures of the model before training depend. Where there are none, a comparison does not take these figures.
    """

    package: str
    methods: dict[str, Method]
    paths: frozenset[str]
    derived: dict[str, str] = field(default_factory=dict)
    before: frozenset[str] = frozenset()

    @property
    def experiments(self) -> Path:
        return Path(__file__).parent / self.package.rpartition(".")[2] / "experiments"

    @property
    def presets(self) -> str:
        """The names of all folders with experiments, for messages."""
        return ", ".join(sorted(path.name for path in self.experiments.iterdir() if path.is_dir()))


@dataclass(kw_only=True)
class RestartArguments:
    """Settings of ReLoRA, for the recipes' own arguments, which have a `method`."""

    relora_interval: int | None = field(
        default=None, metadata={"help": "Optimizer steps after which A and B are merged and begin anew (relora)."}
    )
    relora_warmup: int | None = field(
        default=None, metadata={"help": "Optimizer steps of warm-up after each such restart (relora)."}
    )

    def check_restarts(self, method: str) -> None:
        for name in ("relora_interval", "relora_warmup"):
            value = getattr(self, name)
            if method != "relora" and value is not None:
                raise ValueError(f"method {method} has no restarts, but {name} is set; leave it out.")
            if method == "relora" and value is None:
                raise ValueError(f"method relora needs {name}; set it to a number of optimizer steps.")
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.relora_interval and self.relora_warmup and self.relora_warmup >= self.relora_interval:
            raise ValueError(
                f"relora_warmup is {self.relora_warmup}; it must be less than relora_interval, {self.relora_interval}."
            )


def one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def read_yaml(path: str | Path, size: str | None = None) -> dict[str, Any]:
    """The settings of an experiment: those of its `defaults` file, if it names one, with its own on top.

    Where `optim_args` is a mapping in both, its entries add up. `size` replaces the experiment's own size, which fills
    the {size} in the name of its `defaults` file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no experiment {path}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold 'key: value' lines.")
    defaults, own_size = settings.pop("defaults", ""), settings.pop("size", None)
    if size is not None and own_size is None:
        raise ValueError(f"{path} is of one size, but size is {size!r}: leave it out.")
    inherited = read_yaml(path.parent / defaults.format(size=size or own_size)) if defaults else {}
    own, below = settings.get("optim_args"), inherited.get("optim_args")
    if isinstance(own, dict) and below is not None:
        if not isinstance(below, dict):
            raise ValueError(f"{path} adds optim_args to {below!r}: write that as a mapping, too, {{key: value}}.")
        settings["optim_args"] = below | own
    return inherited | settings


def read_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and `key=value`; several values make a list, no value means true."""
    settings: dict[str, Any] = {}
    key = None
    for argument in arguments:
        is_value = key is not None and not settings[key]  # so that --optim_args rank=8 is no setting called rank
        if argument.startswith("--") or ("=" in argument and not is_value):
            key, has_value, value = argument.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            settings[key] = [value] if has_value else []
            if has_value:
                key = None
        elif key is None:
            raise ValueError(f"{argument!r} is not a setting; write --key value or key=value.")
        else:
            settings[key].append(argument)
    return {key: _override(values) for key, values in settings.items()}


def _override(values: list[str]) -> Any:
    if not values:
        return True
    read = [_word(value) for value in values]
    return read[0] if len(read) == 1 else read


def _word(value: str) -> Any:
    try:
        return json.loads(value)  # numbers, true, false, null; not YAML, to which "no" is false
    except json.JSONDecodeError:
        return value


def load_settings(
    recipe: Recipe, path: str | Path, overrides: dict[str, Any], program: str = "train"
) -> dict[str, Any]:
    """The settings of one run, in one form however they were spelled: 1e-4 is a number, an absolute path relative.

    program "before": those that matter before training, whatever the method.
    """
    overrides = dict(overrides)
    settings = read_yaml(path, overrides.pop("size", None))
    if isinstance(settings.get("optim_args"), dict):
        settings["optim_args"] = ", ".join(f"{key}={value}" for key, value in settings["optim_args"].items())
    settings |= overrides
    if "method" not in settings:
        raise ValueError(f"{path} names no method; it must be one of {', '.join(recipe.methods)}.")
    one_of("method", settings["method"], recipe.methods)
    settings = {key: _normal(value, key in recipe.paths) for key, value in settings.items()}
    if program == "before":
        kept = recipe.before | _NOT_COMPARED
        return {key: value for key, value in settings.items() if key in kept} | {"method": BEFORE, "report_to": "none"}
    _set_method(recipe, settings)
    return settings


def _normal(value: Any, is_path: bool) -> Any:
    if is_path and isinstance(value, str) and os.path.isabs(value):
        return os.path.relpath(value)
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4, which has no dot, as a word
        except ValueError:
            return value
    return value


def _set_method(recipe: Recipe, settings: dict[str, Any]) -> None:
    """Fill in the optimizer that belongs to the method; refuse what contradicts it."""
    name = settings["method"]
    method = recipe.methods[name]
    optimizer = settings.setdefault("optim", method.optimizers[0])
    if optimizer not in method.optimizers:
        raise ValueError(f"method {name} cannot use optim {optimizer}; leave optim out or choose another method.")
    for key, reason in (_DERIVED | recipe.derived).items():
        if key in settings:
            raise ValueError(f"{key} cannot be set here: {reason}.")
    lora_keys = sorted(key for key in settings if key.startswith("lora_"))
    if lora_keys and not method.lora:
        raise ValueError(f"method {name} has no LoRA, but {', '.join(lora_keys)} is set; leave it out.")
    settings["report_to"] = "none"


def to_argv(settings: dict[str, Any]) -> list[str]:
    """The settings as command-line words for `HfArgumentParser`, which gives each its declared type."""
    argv = []
    for key, value in settings.items():
        if value is None:
            continue
        argv.append(f"--{key}")
        if isinstance(value, dict):
            argv.append(json.dumps(value))
        else:
            argv.extend(str(item) for item in (value if isinstance(value, list) else [value]))
    return argv


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Where two runs' settings differ, in words; None if they would compute the same."""
    keys = sorted((before.keys() | now.keys()) - _NOT_COMPARED)
    changed = [key for key in keys if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed) or None
