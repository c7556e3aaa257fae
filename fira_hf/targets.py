"""Model + `FiraConfig` -> which weights are projected, at which rank and alpha, and why the others are not.

Matching is PEFT's: a list entry is a module's exact name or a dotted suffix of it, a string is a regular expression
for the full name, "all-linear" is every linear layer but the output head. In a PEFT model a layer inside an adapter
is also known by the name of the layer that it adapts: "q_proj" finds `q_proj.lora_A.default` and the B beside it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import FiraConfig

ALL_LINEAR = "all-linear"


@dataclass
class Target:
    """A weight that is projected. `rank` is already cut to the short side of the weight."""

    name: str
    parameter: nn.Parameter
    rank: int
    alpha: float


@dataclass
class Skipped:
    """A trainable weight that is not projected, and why."""

    name: str
    parameter: nn.Parameter
    reason: str


@dataclass
class TargetPlan:
    """Every trainable weight of a model, once."""

    projected: list[Target]
    skipped: list[Skipped]


@dataclass
class Layer:
    """A linear layer: its name, the further names that it answers to, and whether it is (part of) the output head."""

    name: str
    aliases: tuple[str, ...]
    weight: nn.Parameter
    is_head: bool


def linear_layers(model: nn.Module) -> list[Layer]:
    """The layers whose weight can be projected: `nn.Linear`, and `Conv1D` as in GPT-2 where transformers is in use."""
    # transformers is looked up, not imported: the model can hold its layers only if it is loaded.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    classes = (nn.Linear, pytorch_utils.Conv1D) if pytorch_utils else (nn.Linear,)
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if head is None:  # a classifier: PEFT's names for its head
        head = next((h for h in (getattr(model, name, None) for name in ("score", "classifier")) if h), None)
    modules = dict(model.named_modules())
    head_name = next((name for name, module in modules.items() if head is not None and module is head), None)
    adapted = [name for name, module in modules.items() if hasattr(module, "base_layer")]
    layers = []
    for name, module in modules.items():
        if isinstance(module, classes) and isinstance(module.weight, nn.Parameter):
            is_head = head_name is not None and (name == head_name or name.startswith(f"{head_name}."))
            layers.append(Layer(name, tuple(_aliases(name, adapted)), module.weight, is_head))
    return layers


def _aliases(name: str, adapted: list[str]) -> Iterator[str]:
    prefix = "base_model.model."  # what a PeftModel puts before every name
    yield name
    if name.startswith(prefix):
        yield name[len(prefix) :]
    for owner in adapted:
        if name.startswith(f"{owner}."):
            inner = name[len(owner) + 1 :].split(".")[0]  # lora_A, lora_B, base_layer
            yield f"{owner}.{inner}".removeprefix(prefix)
            yield owner.removeprefix(prefix)


def matches(target: str | list[str], name: str) -> bool:
    """PEFT's rule: a regular expression for the full name, or a list of names and dotted suffixes."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in target)


def _chosen(target: str | list[str], layer: Layer) -> bool:
    return any(matches(target, name) for name in layer.aliases)


def _layer_index(layer: Layer, config: FiraConfig) -> int | None:
    """The first layer index in the name, behind `layers_pattern` if that is set."""
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer.name)
        if found:
            return int(found[1])
    return None


def unmatched(setting: str, entry: str | list[str], why: str, layers: list[Layer]) -> ValueError:
    """The error for an entry that chooses no weight, with the nearest names that would."""
    entry = entry if isinstance(entry, str) else entry[0]
    names = {alias for layer in layers if layer.weight.requires_grad for alias in layer.aliases}
    # Short names first: what people list are the last parts, "q_proj" and the like.
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(entry, short, n=3) or difflib.get_close_matches(entry, sorted(names), n=3)
    hint = f"the nearest are {', '.join(map(repr, near))}" if near else f"there are {', '.join(map(repr, short[:8]))}"
    return ValueError(f"{setting}: {entry!r} {why}; of the trainable linear layers {hint}.")


def _check_entries(config: FiraConfig, layers: list[Layer], model: nn.Module) -> None:
    """Raises for an entry of the config that chooses nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for probe in _probes(config.target_modules):
        found = [layer for layer in layers if _chosen(probe, layer)]
        if config.target_modules == ALL_LINEAR or any(layer.weight.requires_grad for layer in found):
            continue
        others = any(matches(probe, name) for name in names)
        why = "matches no linear layer" if others else "matches no module of the model"
        raise unmatched("target_modules", probe, "matches only frozen weights" if found else why, layers)
    for probe in _probes(config.exclude_modules or []):
        if not any(_chosen(probe, layer) for layer in layers) and not any(matches(probe, name) for name in names):
            raise unmatched("exclude_modules", probe, "matches no module of the model", layers)
    indices = config.layers_to_transform
    known = {index for layer in layers if (index := _layer_index(layer, config)) is not None}
    for index in [indices] if isinstance(indices, int) else indices or []:
        if index not in known:
            raise ValueError(
                f"layers_to_transform: there is no layer {index} with layers_pattern={config.layers_pattern!r}; "
                f"there are {sorted(known)}."
            )


def _probes(target: str | list[str]) -> list[str] | list[list[str]]:
    """Each entry by itself, in a form that `matches` takes: [regex], or a list for each name."""
    return [target] if isinstance(target, str) else [[entry] for entry in target]


def _from_pattern(pattern: dict[str, int] | dict[str, float], layer: Layer, default: float) -> float:
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", alias) for alias in layer.aliases):
            return value
    return default


def find_targets(model: nn.Module, config: FiraConfig) -> TargetPlan:
    """Sorts the trainable weights of the model into projected and not.

    Raises:
        ValueError: the model has no trainable linear layer, an entry of the config chooses none (the nearest names are
            in the message), or two names of one tied weight want different settings.
    """
    layers = linear_layers(model)
    if not any(layer.weight.requires_grad for layer in layers):
        raise ValueError("The model has no trainable linear layer: there is nothing for Fira to project.")
    _check_entries(config, layers, model)

    targets: dict[nn.Parameter, Target] = {}
    reasons: dict[nn.Parameter, str] = {}
    used: set[str] = set()
    for layer in layers:
        if not layer.weight.requires_grad:
            continue
        reason = _why_not(layer, config)
        if reason is not None:
            reasons.setdefault(layer.weight, reason)
            continue
        rank = min(int(_from_pattern(config.rank_pattern, layer, config.rank)), *layer.weight.shape)
        target = Target(layer.name, layer.weight, rank, _from_pattern(config.alpha_pattern, layer, config.alpha))
        used.update(layer.aliases)
        tied = targets.setdefault(layer.weight, target)
        if (tied.rank, tied.alpha) != (target.rank, target.alpha):
            raise ValueError(
                f"{tied.name} and {layer.name} share one weight, but rank_pattern or alpha_pattern gives them "
                f"rank {tied.rank} and {target.rank}, alpha {tied.alpha} and {target.alpha}: give them the same."
            )
    for setting, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in used):
                raise unmatched(setting, key, "matches no projected layer", layers)
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leaves no weight to project: widen one of them."
        )

    plan = TargetPlan([], [])
    kinds = {p: module for module in model.modules() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter in targets:
            target = targets[parameter]
            plan.projected.append(Target(name, parameter, target.rank, target.alpha))
        elif parameter.requires_grad:
            reason = reasons.get(parameter) or _kind(parameter, kinds[parameter])
            plan.skipped.append(Skipped(name, parameter, reason))
    return plan


def _why_not(layer: Layer, config: FiraConfig) -> str | None:
    if config.target_modules == ALL_LINEAR:
        if layer.is_head:
            return "output head"
    elif not _chosen(config.target_modules, layer):
        return "not in target_modules"
    if config.exclude_modules is not None and _chosen(config.exclude_modules, layer):
        return "in exclude_modules"
    indices = config.layers_to_transform
    # A module that is listed by its exact name needs no index, as in PEFT.
    admitted = [indices] if isinstance(indices, int) else indices
    if admitted and layer.name not in config.target_modules and _layer_index(layer, config) not in admitted:
        return "not in layers_to_transform"
    return None


def _kind(parameter: nn.Parameter, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.ndim < 2:
        return "bias or norm"
    return f"not a linear layer ({type(module).__name__})"
