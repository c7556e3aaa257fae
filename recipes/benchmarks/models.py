"""The weight matrices of the LLaMA sizes of the paper, without the models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from recipes import files
from recipes.pretraining.settings import RECIPE


@dataclass(frozen=True)
class Size:
    """Width, width of the MLP, attention heads, layers, and the rank of what is timed."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    rank: int


def _published(name: str, rank: int) -> Size:
    config = files.read_json(RECIPE.experiments / name / "config.json")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return Size(*(config[key] for key in names), rank)


class Pretended(nn.Parameter):
    """A parameter on the CPU that says it is on an accelerator, and is stepped as one there."""

    device = property(lambda self: torch.device("cuda"))


def pretended(p: torch.Tensor) -> Pretended:
    """A weight in the same memory with the same gradient, for `matrices` on the CPU."""
    other = Pretended(p.detach())
    other.grad = p.grad
    return other


SIZES = {"tiny": Size(64, 172, 1, 2, 16)}  # to try a benchmark out
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 128}
SIZES |= {name: _published(name, rank) for name, rank in RANKS.items()}


def matrices(size: Size, layers: int | None, dtype: torch.dtype, device: str, seed: int = 0) -> list[nn.Parameter]:
    """The seven matrices of each layer's attention and MLP, with gradients of falling singular values.

    A gradient of white noise would have no leading subspace; these have one, as those of real training do.
    """
    h, m = size.hidden, size.intermediate
    generator = torch.Generator(device).manual_seed(seed)
    weights = []
    for shape in ([(h, h)] * 4 + [(m, h)] * 2 + [(h, m)]) * (layers or size.layers):
        p = nn.Parameter((0.02 * torch.randn(shape, device=device, generator=generator)).to(dtype))
        p.grad = gradient(p, generator)
        weights.append(p)
    return weights


def gradient(p: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """A matrix of 32 strong directions and noise, of the size of real gradients."""
    rows, columns = p.shape
    left = torch.randn(rows, 32, device=p.device, generator=generator)
    right = torch.randn(32, columns, device=p.device, generator=generator)
    noise = torch.randn(rows, columns, device=p.device, generator=generator)
    return (1e-4 * (left @ right + noise)).to(p.dtype)
