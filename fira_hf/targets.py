"""Model + `FiraConfig` -> which weights are projected, at which rank and alpha, and why the others are not.

Matching is PEFT's: a list entry is a module's exact name or a dotted suffix of it, a string is a regular expression
for the full name, "all-linear" is every linear layer but the output or classification head. In a PEFT model a layer
inside an adapter is also known by the name of the layer that it adapts: "q_proj" finds `q_proj.lora_A.default` and the
B beside it, and so do matrices of adapters that are parameters and no layers (see `layers`). `target_parameters` names
parameters instead of modules, for weights that no linear layer holds.

Convolutions, those of adapters included, are found by name, or by "all-linear-and-conv", which adds to "all-linear"
those whose matrix (out, in * kernel) is wider than its rank. The others, depthwise ones and such as read or write the
few channels of an image, would be projected to their full rank, which takes more state than AdamW's.

Beyond PEFT, which finds no layer to wrap there, "all-linear" covers the stacked experts of a mixture: they are its
linear layers (many were `nn.Linear` before transformers 5), and hold most of its weights.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import ALL_LINEAR, ALL_LINEAR_AND_CONV, WORDS, FiraConfig, plain_name
from .layers import Layer, weights
from .state import kept_tensors, state_dtype_of
from .views import folded_shape, long_and_short, stacked

FP32 = 4  # bytes
ADAPTERS = "add adapters (PEFT's LoRA)"  # the way out for who would train quantised weights


@dataclass(eq=False)  # as all below: a weight has no one truth value that a comparison could use
class Target:
    """A weight that is projected: a matrix or several, each by itself. `rank` is cut to the short side of a matrix.

    split: equal parts of a fused matrix. transposed: stored (in, out), the other way round than by `nn.Linear`.
    convolution: stored (out, in, *kernel).
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    rank: int
    alpha: float
    config: FiraConfig = field(default_factory=FiraConfig, repr=False)
    split: int = 1
    transposed: bool = False
    convolution: bool = False

    def __post_init__(self) -> None:
        self.rank = min(self.rank, *self._long_and_short)

    @property
    def matrices(self) -> int:
        """How many matrices are projected: experts of a stack, parts of a fused matrix."""
        return math.prod(stacked(self._shape, self.split))

    @property
    def _shape(self) -> torch.Size:
        return folded_shape(self.parameter.shape, self.convolution)

    @property
    def _long_and_short(self) -> tuple[int, int]:
        return long_and_short(self._shape, self.split, self.transposed)

    @property
    def state_bytes(self) -> int:
        """Of the tensors in its state; basis, moments and the fp32 scalars of each matrix."""
        of_weight = {name: getattr(self, name) for name in ("rank", "split", "transposed", "convolution")}
        kept = kept_tensors(self.parameter.shape, {**vars(self.config), **of_weight})
        return sum(tensor.nbytes for tensor in kept.values())


@dataclass(eq=False)
class Skipped:
    """A trainable weight that is not projected, and why."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    reason: str
    state_itemsize: int = FP32

    @property
    def state_bytes(self) -> int:
        """Two moments, and the fp32 scalar `step`."""
        return self.state_itemsize * 2 * self.parameter.numel() + FP32


@dataclass(eq=False)
class TargetPlan:
    """Every trainable weight of a model, once."""

    projected: list[Target]
    skipped: list[Skipped]

    @property
    def state_bytes(self) -> int:
        """Optimizer state of `FiraAdamW` once every weight has had a gradient."""
        return sum(w.state_bytes for w in self.projected) + sum(w.state_bytes for w in self.skipped)

    @property
    def adamw_bytes(self) -> int:
        """The same of torch's AdamW."""
        weights = [w.parameter for w in self.projected] + [w.parameter for w in self.skipped]
        return sum(map(adamw_state_bytes, weights))


def adamw_state_bytes(parameter: nn.Parameter) -> int:
    """State of one weight in `torch.optim.AdamW`: two moments in the weight's own dtype, and an fp32 `step`."""
    return 2 * parameter.numel() * parameter.element_size() + FP32


def matches(target: str | list[str], name: str) -> bool:
    """PEFT's rule: a regular expression for the full name, or a list of names and dotted suffixes."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in target)


def scoped(regex: str) -> str:
    """The expression as a part of a longer one, in which flags such as (?i) in front of it are its own."""
    flags = re.match(r"(?:\(\?[aimsux]+\))*", regex)[0]  # type: ignore[index]
    if not flags:
        return regex
    letters = "".join(sorted(set(re.findall(r"\w", flags))))
    end = "\n" if "x" in letters else ""  # of a comment
    return f"(?{letters}:{regex[len(flags) :]}{end})"


def _chosen(target: str | list[str], layer: Layer) -> bool:
    return any(matches(target, name) for name in layer.aliases)


def _is_named(config: FiraConfig, layer: Layer) -> bool:
    """Whether `target_parameters` names it."""
    return config.target_parameters is not None and any(matches(config.target_parameters, n) for n in layer.parameters)


def _is_excluded(excluded: str | list[str], layer: Layer) -> bool:
    return any(matches(excluded, name) for name in (*layer.modules, *layer.aliases))


def _layer_index(layer: Layer, config: FiraConfig) -> int | None:
    """The first layer index in the name, behind `layers_pattern` if that is set."""
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.)(?:{scoped(pattern)})\.(?P<index>\d+)\.", layer.name)
        if found:
            return int(found["index"])
    return None


def unmatched(setting: str, entry: str | list[str], why: str, layers: list[Layer]) -> ValueError:
    """The error for an entry that chooses no weight, with the nearest names that would."""
    is_regex, entry = isinstance(entry, str), entry if isinstance(entry, str) else entry[0]
    names = {alias for layer in layers if layer.weight.requires_grad for alias in layer.aliases}
    # Short names first: what people list are the last parts, "q_proj" and the like.
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    tries = ((entry, short), (entry, sorted(names)), (entry.rsplit(".", 1)[-1], short))
    near = next(filter(None, (difflib.get_close_matches(text, known, n=3) for text, known in tries)), None)
    hint = f"the nearest are {', '.join(map(repr, near))}" if near else f"there are {', '.join(map(repr, short[:8]))}"
    if not names:
        hint = "there is none that is trained"
    if is_regex and entry in short:
        hint = f"a string is a regular expression for the whole name: write [{entry!r}]"
        if setting == "optim_target_modules":
            hint += f", or on a command line '.*{entry}.*'"
    return ValueError(f"{setting}: {entry!r} {why}; {hint}.")


def other_than_linear(
    everything: list[Layer], matched: Callable[[str], bool], setting: str = "target_parameters"
) -> str | None:
    """What to do about trained matrices that no layer holds, in words, where a name of theirs is matched."""
    named = [
        layer
        for layer in everything
        if not layer.is_layer and any(map(matched, (*layer.modules, *layer.owners, *layer.parameters)))
    ]
    for layer in named:
        if layer.is_worth_naming:
            return f"parameters such as {layer.parameters[0]}, which {setting} names"
    for layer in named:
        if layer.is_convolution and layer.weight.requires_grad:
            return f"the convolution {layer.parameters[0]}, which is parametrized: leave it out"
    return None


def _check_entries(config: FiraConfig, everything: list[Layer], candidates: list[Layer], model: nn.Module) -> None:
    """Raises for an entry of the config that chooses nothing."""
    names = [name for name, _ in model.named_modules() if name]
    layers = [layer for layer in everything if layer.is_layer]
    others = [layer for layer in everything if not layer.is_linear and layer.is_matrix]
    for probe in _probes(config.target_modules) if config.target_modules not in WORDS else []:
        found = [layer for layer in layers if _chosen(probe, layer)]
        if any(layer.weight.requires_grad for layer in found):
            continue
        why = "matches only frozen weights" if found else "matches no module of the model"
        if found and all(layer.is_quantised for layer in found):
            why = f"matches only quantised weights, which cannot be trained: {ADAPTERS}"
        if not found and any(matches(probe, name) for name in names):
            why = "matches no linear layer or convolution"
        if hint := other_than_linear(everything, partial(matches, probe)):
            raise ValueError(f"target_modules: {probe if isinstance(probe, str) else probe[0]!r} {why}, but {hint}.")
        raise unmatched("target_modules", probe, why, layers)
    for entry in config.target_parameters or []:
        found = [layer for layer in everything if any(matches([entry], name) for name in layer.parameters)]
        for layer in found:
            if layer.weight.requires_grad and not layer.is_matrix:
                of_shape = f"of shape {tuple(layer.weight.shape)}{', a convolution' * layer.is_convolution}"
                can_be_meant = any(other.is_matrix for other in found)
                way = "give more of the name, or leave it out" if can_be_meant else "leave it out"
                way = f"name {layer.name!r} in target_modules" if layer.is_conv else way
                raise ValueError(
                    f"target_parameters: {entry!r} matches {layer.parameters[0]}, {of_shape}, but only matrices and "
                    f"stacks of them (3-D) can be projected: {way}."
                )
        if not any(layer.weight.requires_grad for layer in found):
            why = "matches only frozen weights" if found else "matches no parameter of the model"
            raise unmatched("target_parameters", [entry], why, others)
    for probe in _probes(config.exclude_modules or []):
        if any(_is_excluded(probe, one) for one in candidates):
            continue
        modules = [name for name in names if matches(probe, name)]
        if not modules:
            raise unmatched("exclude_modules", probe, "matches no module of the model", candidates)
        for name in modules:
            if any(one.name.startswith(f"{name}.") for one in candidates):
                entry = probe if isinstance(probe, str) else probe[0]
                way = rf"{entry}\..*" if isinstance(probe, str) else rf"(.*\.)?{re.escape(entry)}\..*"
                raise ValueError(
                    f"exclude_modules: {entry!r} matches {name!r}, which holds linear layers and is none, so it "
                    f"excludes nothing: write a regular expression of what it holds, exclude_modules={way!r}."
                )
    indices = config.layers_to_transform
    known = {index for layer in candidates if (index := _layer_index(layer, config)) is not None}
    for index in [indices] if isinstance(indices, int) else indices or []:
        if not known:
            containers = sorted({match[1] for name in names if (match := re.search(r"([^.]+)\.\d+(?:\.|$)", name))})
            pattern = "" if config.layers_pattern is None else f" by layers_pattern={config.layers_pattern!r}"
            raise ValueError(
                f"layers_to_transform={indices!r} finds no list of layers{pattern}; the model has {containers}."
            )
        if index not in known:
            raise ValueError(
                f"layers_to_transform: there is no layer {index}; there are {min(known)} to {max(known)}."
            )


def _probes(target: str | list[str]) -> list[str] | list[list[str]]:
    """Each entry by itself, in a form that `matches` takes: [regex], or a list for each name."""
    return [target] if isinstance(target, str) else [[entry] for entry in target]


def _pattern_key(pattern: dict[str, Any], layer: Layer) -> str | None:
    """The first key that matches the layer, by PEFT's rule for patterns."""
    for key in pattern:
        if any(re.match(rf"(.*\.)?({scoped(key)})$", alias) for alias in layer.aliases):
            return key
    return None


def find_targets(model: nn.Module, config: FiraConfig) -> TargetPlan:
    """Sorts the trainable weights of the model into projected and not.

    Raises:
        ValueError: the model has no trainable linear layer, an entry of the config chooses none (the nearest names are
            in the message), or two names of one tied weight want different settings.
    """
    everything = weights(model)
    # To "all-linear" convolutions are nothing that it could have chosen.
    takes_conv = config.target_modules != ALL_LINEAR
    layers = [
        layer
        for layer in everything
        if layer.is_linear or layer.is_experts or (takes_conv and layer.is_conv) or _is_named(config, layer)
    ]
    trained = [layer for layer in layers if layer.weight.requires_grad]
    if not trained:
        raise _no_linear_layer(everything)
    _check_entries(config, everything, layers, model)

    patterns = {name: getattr(config, f"{name}_pattern") for name in ("rank", "alpha", "split")}
    targets: dict[nn.Parameter, Target] = {}
    reasons: dict[nn.Parameter, str] = {}
    left_out: dict[nn.Parameter, Layer] = {}
    chosen: list[Layer] = []
    used: set[tuple[str, str | None]] = set()
    for layer in trained:
        keys = {name: _pattern_key(pattern, layer) for name, pattern in patterns.items()}
        own: dict[str, Any] = {name: patterns[name][key] for name, key in keys.items() if key is not None}
        if (reason := _why_not(layer, config, own.get("rank", config.rank), own.get("split", 1))) is not None:
            reasons.setdefault(layer.weight, reason)
            left_out.setdefault(layer.weight, layer)
            continue
        if (layer.is_linear and layer.weight.ndim != 2) or (layer.is_conv and layer.weight.ndim < 3):
            raise ValueError(
                f"{layer.name} has a weight of shape {tuple(layer.weight.shape)}: Fira cannot project flattened "
                "weights (FSDP1, DeepSpeed). Use DDP or fully_shard."
            )
        _check_split(layer, own.get("split", 1))
        own = {"rank": config.rank, "alpha": config.alpha, **own}
        target = Target(layer.name, layer.weight, **own, transposed=layer.transposed, convolution=layer.is_conv)
        chosen.append(layer)
        used |= set(keys.items())
        tied = targets.setdefault(layer.weight, target)
        if any(getattr(tied, name) != getattr(target, name) for name in patterns):
            raise ValueError(
                f"{tied.name} and {layer.name} share one weight, but rank_pattern, alpha_pattern or split_pattern "
                f"gives them rank {tied.rank} and {target.rank}, alpha {tied.alpha} and {target.alpha}, "
                f"{tied.split} and {target.split} parts: give them the same."
            )
    for name, pattern in patterns.items():
        for key in pattern:
            if chosen and (name, key) not in used:
                why = "matches no projected layer that an earlier entry leaves to it"
                raise unmatched(f"{name}_pattern", key, why, chosen)
    if not targets:
        raise _none_left(config, layers, reasons)

    itemsize = state_dtype_of(config.state_dtype).itemsize
    plan = TargetPlan([], [])
    kinds = {layer.weight: layer.kind for layer in everything}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter in targets:
            plan.projected.append(replace(targets[parameter], name=name, config=config))
        elif parameter.requires_grad:
            reason = reasons.get(parameter) or kinds[parameter]
            if parameter in embeddings and parameter in left_out and left_out[parameter].is_layer:
                layer = left_out[parameter]
                why = "" if reason == "output head" else f", which is {reason}"
                reason = f"embedding, tied to {'the output head' if layer.is_head else plain_name(layer.name)}{why}"
            plan.skipped.append(Skipped(name, parameter, reason, itemsize))
    return plan


def _no_linear_layer(everything: list[Layer]) -> ValueError:
    trained = [layer for layer in everything if layer.weight.requires_grad]
    named = [layer.parameters[0] for layer in trained if layer.is_worth_naming]
    kinds = ", ".join(sorted({layer.kind for layer in trained}))
    convolutions = [layer.name for layer in trained if layer.is_conv]
    if any(layer.is_linear and layer.is_quantised for layer in everything):
        what = f"its linear layers are quantised and frozen: {ADAPTERS}"
    elif convolutions:
        what = f"convolutions such as {convolutions[0]} are trained: set target_modules={ALL_LINEAR_AND_CONV!r}"
    elif named:
        what = f"matrices such as {' and '.join(named[:2])} are trained: name them in target_parameters"
    elif trained:
        what = f"what is trained ({kinds}; {trained[0].parameters[0]}) Fira does not project: use AdamW"
    else:
        what = "all its parameters are frozen"
    return ValueError(f"The model has no trainable linear layer: {what}.")


def _none_left(config: FiraConfig, layers: list[Layer], reasons: dict[nn.Parameter, str]) -> ValueError:
    """The error where the trained linear layers are all left out."""
    settings = ("target_modules", "exclude_modules", "layers_to_transform")
    said = {name: value for name in settings if (value := getattr(config, name)) is not None and value not in WORDS}
    if said:
        way = f"Change {' or '.join(f'{name}={value!r}' for name, value in said.items())}"
    else:
        heads = sorted({layer.name for layer in layers if layer.weight in reasons and not layer.is_empty})
        frozen = [layer for layer in layers if not layer.weight.requires_grad]
        is_quantised = any(layer.is_quantised for layer in frozen)
        others = f"The other linear layers ({len(frozen)}) are {'quantised and ' * is_quantised}frozen"
        ways = [ADAPTERS if is_quantised else "train them"] if frozen else []
        ways += [f"name {' and '.join(map(repr, heads[:3]))} in target_modules"] if heads else []
        way = f"{others}: " if frozen else ""
        way += " or ".join(ways) or "Use AdamW"
    why = ", ".join(sorted(set(reasons.values())))
    return ValueError(f"No weight is left to project (the trained linear layers are: {why}). {way}.")


def _check_split(layer: Layer, split: int) -> None:
    shape = tuple(folded_shape(layer.weight.shape, layer.is_conv))
    if split > 1 and not layer.is_ordered:
        raise ValueError(
            f"split_pattern: {layer.name} of shape {shape} cannot be split: its module does not say that it fuses "
            "parts one after another (is_concatenated). Leave it out."
        )
    if shape[-1 if layer.transposed else -2] % split:
        raise ValueError(
            f"split_pattern: {split} does not divide the output dimension of {layer.name}, of shape {shape}; unequal "
            "parts, such as those of a grouped-query qkv, cannot be split. Leave it out."
        )


def _why_not(layer: Layer, config: FiraConfig, rank: int, split: int) -> str | None:
    if layer.is_empty:
        return "without elements"
    if _is_named(config, layer):
        pass
    elif config.target_modules in WORDS:
        if layer.is_head:
            return "output head"
        # At its full rank a low-rank state is larger than AdamW's. A whole moment is not.
        gains_nothing = config.residual != "moment" and layer.is_convolution
        if gains_nothing and long_and_short(folded_shape(layer.weight.shape, True), split, False)[1] <= rank:
            return "convolution no wider than its rank"
    elif layer.is_experts:
        return "stacked experts, not in target_parameters"
    elif not _chosen(config.target_modules, layer):
        return "not in target_modules"
    if config.exclude_modules is not None and _is_excluded(config.exclude_modules, layer):
        return "in exclude_modules"
    indices = config.layers_to_transform
    # A module that is listed by its exact name needs no index, as in PEFT.
    admitted = [indices] if isinstance(indices, int) else indices
    modules = [] if isinstance(config.target_modules, str) else config.target_modules
    exact = modules if layer.is_layer else config.target_parameters or []
    if admitted and layer.name not in exact and _layer_index(layer, config) not in admitted:
        return "not in layers_to_transform"
    return None
