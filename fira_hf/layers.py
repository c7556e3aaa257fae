"""What a model is made of, for an optimizer: every parameter, the names it answers to, and its kind."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .config import plain_name

# Where torch keeps the tensors that a parametrized weight is computed from: weight_norm's, spectral_norm's.
PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\..*")


@dataclass(eq=False)  # a weight has no one truth value that a comparison could use
class Layer:
    """The weight of a linear layer, or a parameter by itself.

    modules: the names that its module answers to. owners: those of the layer that a parametrized weight belongs to.
    leaf: its own name there. is_linear: whether it is the weight of a linear layer, or a matrix of an adapter.
    is_conv: whether it is the weight of a convolution; is_convolution: or a part of one that is parametrized.
    is_head: whether it is (part of) the output head. is_experts: whether it stacks experts. transposed: whether it is
    stored (in, out). is_ordered: whether parts that it fuses would lie one after another along the output dimension.
    kind: what it is, for who asks why it is not projected.
    """

    modules: tuple[str, ...]
    owners: tuple[str, ...]
    leaf: str
    weight: nn.Parameter = field(repr=False)
    is_linear: bool
    is_conv: bool
    is_head: bool
    is_experts: bool
    is_convolution: bool
    transposed: bool
    is_ordered: bool
    kind: str

    @property
    def name(self) -> str:
        return self.aliases[0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """What it is called by: a layer like its module, a parameter like itself, an adapter's like both."""
        if not self.is_layer:
            return self.parameters
        return self.modules if self.leaf == "weight" else (*self.parameters, *self.modules)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(f"{module}.{self.leaf}" if module else self.leaf for module in self.modules)

    @property
    def is_layer(self) -> bool:
        """Whether `target_modules` can choose it."""
        return self.is_linear or self.is_conv

    @property
    def is_empty(self) -> bool:
        """Whether it is a matrix, or several, without elements: nn.Linear(8, 0), an adapter that is pruned to rank 0.

        What has lost its dimensions (DeepSpeed leaves (0,) of a weight that is elsewhere) is none.
        """
        return self.weight.ndim > 1 and self.weight.numel() == 0

    @property
    def is_quantised(self) -> bool:
        """Whether it holds codes in place of numbers, as a base in 4 bits: it cannot be trained."""
        return not self.weight.is_floating_point()

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or a stack of them. The kernels of a convolution are none, whatever their shape."""
        return self.weight.ndim in (2, 3) and not self.is_convolution

    @property
    def is_worth_naming(self) -> bool:
        """Whether to advise naming it in `target_parameters`: it is trained, and no vector of shape (n, 1)."""
        return self.weight.requires_grad and self.is_matrix and min(self.weight.shape[-2:]) > 1


def weights(model: nn.Module) -> list[Layer]:
    """Every parameter of the model.

    Linear layers are `nn.Linear`, GPT-2's `Conv1D` where it is in use, and the matrices of PEFT's adapters that are
    parameters and no layers (AdaLoRA, LoHa, LoKr and others), by PEFT's own list of what a tuner layer trains.
    """
    # transformers and PEFT are looked up, not imported: the model can hold their layers only if they are loaded.
    conv1d = _loaded("transformers.pytorch_utils", "Conv1D")
    tuner_layer = _loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    modules = dict(model.named_modules())
    found_heads = set(_heads(modules))
    heads = [name for name, module in modules.items() if module in found_heads]
    adapted = {name for name, module in modules.items() if _is_wrapper(module)}
    tuners = {name: module for name, module in modules.items() if isinstance(module, tuner_layer)}
    found = []
    for name, module in modules.items():
        names = tuple(_aliases(name, adapted))
        owner = PARAMETRIZED.sub("", name)
        is_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        for leaf, p in module.named_parameters(recurse=False):
            tuner = _tuner_of(f"{name}.{leaf}", tuners)
            of_embedding = isinstance(tuner.get_base_layer() if tuner else module, nn.Embedding)
            of_adapter = tuner is not None and not of_embedding and p.ndim == 2 and 1 not in p.shape
            is_linear = of_adapter or (leaf == "weight" and isinstance(module, (nn.Linear, *conv1d)))
            is_conv = leaf == "weight" and isinstance(module, _ConvNd)
            is_experts = p.ndim == 3 and "Experts" in type(module).__name__
            is_convolution = p.ndim > 2 and isinstance(modules[owner], _ConvNd)
            # What transformers 5 says of its experts. Of others it is not known whether parts can be told apart.
            transposed = isinstance(module, conv1d) or (p.ndim == 3 and getattr(module, "is_transposed", False))
            is_ordered = p.ndim == 2 or is_conv or getattr(module, "is_concatenated", False)
            kind = "embedding" if of_embedding else _kind(f"{name}.{leaf}", p, module, modules[owner], tuner)
            owners = tuple(_aliases(owner, adapted)) if owner != name else ()
            flags = (is_linear, is_conv, is_head, is_experts, is_convolution, transposed, is_ordered)
            found.append(Layer(names, owners, leaf, p, *flags, kind))
    return found


def _kind(name: str, p: nn.Parameter, module: nn.Module, owner: nn.Module, tuner: Any) -> str:
    if p.ndim < 2 or name.endswith("bias"):  # those of stacked experts are stacked, too
        return "vector: bias, norm"
    if tuner is not None and not isinstance(module, _ConvNd):
        return "vector of an adapter" if p.ndim == 2 else "stack of an adapter"
    if owner is not module:
        return f"part of a parametrized layer ({type(owner).__name__})"
    if isinstance(module, nn.Linear):
        return f"beside the weight of a linear layer ({type(module).__name__})"
    return f"not a linear layer ({type(module).__name__})"


def target_layers(model: nn.Module) -> list[Layer]:
    """The layers that `target_modules` can choose."""
    return [layer for layer in weights(model) if layer.is_layer]


def _loaded(module: str, name: str) -> tuple[Any, ...]:
    """(the class,) of a module that is loaded, or () for `isinstance`."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


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


def _tuner_of(name: str, tuners: dict[str, Any]) -> Any:
    """The nearest of PEFT's tuner layers around a parameter, if it lists the parameter as part of its adapter."""
    owner, inner = name, ""
    while owner:
        owner, _, inner = owner.rpartition(".")
        if owner in tuners:
            return tuners[owner] if inner in tuners[owner].adapter_layer_names else None
    return None


def _aliases(name: str, adapted: Set[str]) -> Iterator[str]:
    yield name
    yield plain_name(name)
    parts = name.split(".")
    for end in range(1, len(parts)):
        owner = ".".join(parts[:end])
        if owner in adapted:
            yield plain_name(f"{owner}.{parts[end]}")  # lora_A, lora_B, base_layer, modules_to_save
            yield plain_name(owner)
