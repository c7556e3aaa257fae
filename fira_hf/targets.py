"""Model + `FiraConfig` -> which weights are projected, at which rank and alpha, and why the others are not.

Matching is PEFT's: a list entry is a module's exact name or a dotted suffix of it, a string is a regular expression
for the full name, "all-linear" is every linear layer but the output or classification head. In a PEFT model a layer
inside an adapter is also known by the name of the layer that it adapts: "q_proj" finds `q_proj.lora_A.default` and the
B beside it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import ALL_LINEAR, FiraConfig

FP32 = 4  # bytes
SHARDED = "Fira cannot project sharded or flattened weights (FSDP, DeepSpeed, tensor parallel): use one device or DDP"
# What DDP, torch.compile and PEFT put before every name.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")


@dataclass
class Target:
    """A weight that is projected. `rank` is already cut to the short side of the weight."""

    name: str
    parameter: nn.Parameter
    rank: int
    alpha: float
    state_itemsize: int = FP32

    @property
    def state_bytes(self) -> int:
        """Basis and two moments, and the fp32 scalars `step` and `residual_norm`."""
        long, short = max(self.parameter.shape), min(self.parameter.shape)
        return self.state_itemsize * (short * self.rank + 2 * long * self.rank) + 2 * FP32


@dataclass
class Skipped:
    """A trainable weight that is not projected, and why."""

    name: str
    parameter: nn.Parameter
    reason: str
    state_itemsize: int = FP32

    @property
    def state_bytes(self) -> int:
        """Two moments, and the fp32 scalar `step`."""
        return self.state_itemsize * 2 * self.parameter.numel() + FP32


@dataclass
class TargetPlan:
    """Every trainable weight of a model, once."""

    projected: list[Target]
    skipped: list[Skipped]

    @property
    def state_bytes(self) -> int:
        """Optimizer state of `FiraAdamW` once every weight has had a gradient."""
        return sum(w.state_bytes for w in self.projected) + sum(w.state_bytes for w in self.skipped)


def adamw_state_bytes(parameter: nn.Parameter) -> int:
    """State of one weight in `torch.optim.AdamW`: two moments in the weight's own dtype, and an fp32 `step`."""
    return 2 * parameter.numel() * parameter.element_size() + FP32


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
    modules = dict(model.named_modules())
    heads = [name for name, module in modules.items() if any(module is head for head in _heads(modules))]
    adapted = [name for name, module in modules.items() if _is_wrapper(module)]
    layers = []
    for name, module in modules.items():
        if isinstance(module, classes) and isinstance(module.weight, nn.Parameter):
            is_head = any(name == head or name.startswith(f"{head}.") for head in heads)
            layers.append(Layer(name, tuple(_aliases(name, adapted)), module.weight, is_head))
    return layers


def _heads(modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Output heads of the language models, and classification heads (by PEFT's names), found inside any wrapper."""
    for module in modules.values():
        get_head: Any = getattr(module, "get_output_embeddings", None)
        if get_head is None:
            continue
        candidates = [get_head(), *(getattr(module, name, None) for name in ("score", "classifier"))]
        yield from (head for head in candidates if isinstance(head, nn.Module))


def _is_wrapper(module: nn.Module) -> bool:
    """A layer that PEFT adapts, or keeps a trained copy of."""
    return hasattr(module, "base_layer") or isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def _aliases(name: str, adapted: list[str]) -> Iterator[str]:
    yield name
    yield WRAPPERS.sub("", name)
    for owner in adapted:
        if name.startswith(f"{owner}."):
            inner = name[len(owner) + 1 :].split(".")[0]  # lora_A, lora_B, base_layer, modules_to_save
            yield WRAPPERS.sub("", f"{owner}.{inner}")
            yield WRAPPERS.sub("", owner)


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
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", layer.name)
        if found:
            return int(found["index"])
    return None


def unmatched(setting: str, entry: str | list[str], why: str, layers: list[Layer]) -> ValueError:
    """The error for an entry that chooses no weight, with the nearest names that would."""
    is_regex, entry = isinstance(entry, str), entry if isinstance(entry, str) else entry[0]
    names = {alias for layer in layers if layer.weight.requires_grad for alias in layer.aliases}
    # Short names first: what people list are the last parts, "q_proj" and the like.
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(entry, short, n=3) or difflib.get_close_matches(entry, sorted(names), n=3)
    hint = f"the nearest are {', '.join(map(repr, near))}" if near else f"there are {', '.join(map(repr, short[:8]))}"
    if is_regex and entry in short:
        hint = f"a string is a regular expression for the whole name: write [{entry!r}]"
    return ValueError(f"{setting}: {entry!r} {why}; {hint}.")


def _check_entries(config: FiraConfig, layers: list[Layer], model: nn.Module) -> None:
    """Raises for an entry of the config that chooses nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for probe in _probes(config.target_modules) if config.target_modules != ALL_LINEAR else []:
        found = [layer for layer in layers if _chosen(probe, layer)]
        if any(layer.weight.requires_grad for layer in found):
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
        if not known:
            containers = sorted({match[1] for name in names if (match := re.search(r"([^.]+)\.\d+(?:\.|$)", name))})
            raise ValueError(
                f"layers_pattern={config.layers_pattern!r} matches no list of layers; the model has {containers}."
            )
        if index not in known:
            raise ValueError(
                f"layers_to_transform: there is no layer {index}; there are {min(known)} to {max(known)}."
            )


def _probes(target: str | list[str]) -> list[str] | list[list[str]]:
    """Each entry by itself, in a form that `matches` takes: [regex], or a list for each name."""
    return [target] if isinstance(target, str) else [[entry] for entry in target]


def _pattern_key(pattern: dict[str, int] | dict[str, float], layer: Layer) -> str | None:
    """The first key that matches the layer, by PEFT's rule for patterns."""
    for key in pattern:
        if any(re.match(rf"(.*\.)?({key})$", alias) for alias in layer.aliases):
            return key
    return None


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
    chosen: list[Layer] = []
    used: set[str | None] = set()
    for layer in layers:
        if not layer.weight.requires_grad:
            continue
        reason = _why_not(layer, config)
        if reason is not None:
            reasons.setdefault(layer.weight, reason)
            continue
        if layer.weight.ndim != 2:
            raise ValueError(f"{layer.name} has a weight of shape {tuple(layer.weight.shape)}: {SHARDED}.")
        rank_key, alpha_key = (_pattern_key(p, layer) for p in (config.rank_pattern, config.alpha_pattern))
        rank = config.rank if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        target = Target(layer.name, layer.weight, min(rank, *layer.weight.shape), alpha)
        chosen.append(layer)
        used |= {rank_key, alpha_key}
        tied = targets.setdefault(layer.weight, target)
        if (tied.rank, tied.alpha) != (target.rank, target.alpha):
            raise ValueError(
                f"{tied.name} and {layer.name} share one weight, but rank_pattern or alpha_pattern gives them "
                f"rank {tied.rank} and {target.rank}, alpha {tied.alpha} and {target.alpha}: give them the same."
            )
    for setting, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if chosen and key not in used:
                raise unmatched(setting, key, "matches no projected layer that an earlier entry leaves to it", chosen)
    if not targets:
        reasons_given = ", ".join(sorted(set(reasons.values())))
        raise ValueError(
            f"No weight is left to project (the linear layers are: {reasons_given}). Widen target_modules="
            f"{config.target_modules!r}, or what restricts it."
        )

    itemsize = getattr(torch, config.state_dtype).itemsize
    plan = TargetPlan([], [])
    kinds = {p: module for module in model.modules() for p in module.parameters(recurse=False)}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter in targets:
            target = targets[parameter]
            plan.projected.append(Target(name, parameter, target.rank, target.alpha, itemsize))
        elif parameter.requires_grad:
            reason = reasons.get(parameter) or _kind(parameter, kinds[parameter])
            if parameter in reasons and parameter in embeddings:
                reason = f"embedding, tied to the {reason}"
            plan.skipped.append(Skipped(name, parameter, reason, itemsize))
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
        return "vector: bias, norm"
    return f"not a linear layer ({type(module).__name__})"
