"""What one run is told: a flat YAML file, what the command line changes in it, and the recipe's own arguments.

Nothing here imports torch, so that `compare` can read an experiment at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.commonsense.tasks import TASKS

EXPERIMENTS = Path(__file__).parent / "experiments"
# Where a run writes and how it is started do not change what it computes.
_NOT_COMPARED = {"output_dir", "dry_run", "disable_tqdm", "log_level"}
_DERIVED = {
    "optim_target_modules": "it follows from the method; name the layers with target_modules",
    "report_to": "a run writes its figures into its own folder and logs in nowhere",
    "resume_from_checkpoint": "a run continues by itself from the last checkpoint in its folder",
}
_PATHS = {"output_dir", "data_dir", "train_file", "model", "model_config"}


@dataclass(frozen=True)
class Method:
    """What defines a method: whether LoRA wraps the model, and which optimizers it may use (the first by default)."""

    lora: bool
    optimizers: tuple[str, ...]


METHODS = {
    "lora": Method(lora=True, optimizers=("adamw_torch", "adamw_torch_fused")),
    "fira-on-lora": Method(lora=True, optimizers=("fira",)),
    "fira-full": Method(lora=False, optimizers=("fira",)),
    "adamw-full": Method(lora=False, optimizers=("adamw_torch", "adamw_torch_fused")),
    "galore-full": Method(lora=False, optimizers=("galore_adamw",)),
}


@dataclass
class RecipeArguments:
    """The recipe's settings beside `transformers.TrainingArguments`."""

    method: str = field(metadata={"help": "One of " + ", ".join(METHODS) + "."})
    model: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "The embedded model, or the path or hub name of any causal language model."},
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    data_dir: str = field(
        default="recipes/commonsense/data", metadata={"help": "Folder with <task>/train.json and <task>/test.json."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "One file with the training examples of all tasks, instead of <task>/train.json."},
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Which tasks, by folder name."})
    max_train_per_task: int | None = field(
        default=None, metadata={"help": "At most so many training examples a task."}
    )
    max_test_per_task: int | None = field(
        default=None, metadata={"help": "At most so many questions a task; 0: none."}
    )
    val_set_size: int = field(default=120, metadata={"help": "Training examples set aside for the validation loss."})
    train_on_inputs: bool = field(
        default=True, metadata={"help": "Learn the prompt as well as the answer; false: the answer only."}
    )
    cutoff_len: int = field(default=256, metadata={"help": "Training examples are cut to so many tokens."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers that LoRA wraps, or whose gradients Fira and GaLore project."},
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA's A and B."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's A."})
    scoring: str = field(default="loglik", metadata={"help": "loglik (fast) or generate (as published)."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Questions scored at once."})
    keep_model: bool = field(
        default=True, metadata={"help": "Save the trained model (or adapter) in output_dir/model."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check data, targets and memory, and train nothing."})
    model_config: str | None = field(
        default=None, metadata={"help": "config.json for a dry run where the model itself is not at hand."}
    )

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _one_of("scoring", self.scoring, ("loglik", "generate"))
        for task in self.tasks:
            _one_of("tasks", task, TASKS)
        for name in ("cutoff_len", "lora_rank", "lora_alpha", "scoring_batch_size", "max_train_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("val_set_size", "max_test_per_task"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if self.train_file is not None and self.max_train_per_task is not None:
            raise ValueError("max_train_per_task needs <task>/train.json; a train_file does not name its tasks.")


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of an experiment: those of its `defaults` file, if it names one, with its own on top."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no experiment {path}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold 'key: value' lines.")
    defaults = settings.pop("defaults", None)
    return (read_yaml(path.parent / defaults) if defaults else {}) | settings


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


def load_settings(path: str | Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings of one run, in one form however they were spelled: 1e-4 is a number, an absolute path relative."""
    settings = read_yaml(path) | overrides
    if "method" not in settings:
        raise ValueError(f"{path} names no method; it must be one of {', '.join(METHODS)}.")
    _one_of("method", settings["method"], METHODS)
    settings = {key: _normal(key, value) for key, value in settings.items()}
    _set_method(settings)
    return settings


def _normal(key: str, value: Any) -> Any:
    if key in _PATHS and isinstance(value, str) and os.path.isabs(value):
        return os.path.relpath(value)
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4, which has no dot, as a word
        except ValueError:
            return value
    return value


def _set_method(settings: dict[str, Any]) -> None:
    """Fill in the optimizer that belongs to the method; refuse what contradicts it."""
    name = settings["method"]
    method = METHODS[name]
    optimizer = settings.setdefault("optim", method.optimizers[0])
    if optimizer not in method.optimizers:
        raise ValueError(f"method {name} cannot use optim {optimizer}; leave optim out or choose another method.")
    for key, reason in _DERIVED.items():
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
