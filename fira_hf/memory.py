"""Bytes of training by component, from shapes alone: nothing is allocated, so a model on the meta device will do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import FiraConfig
from .targets import adamw_state_bytes, find_targets


@dataclass
class MemoryEstimate:
    """Bytes on one device, without activations."""

    weights: int
    gradients: int
    optimizer_state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state


def estimate_memory(model: nn.Module, config: FiraConfig | None) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer state: Fira by the config, or torch's AdamW where it is None."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config is None:
        state = sum(map(adamw_state_bytes, trainable))
    else:
        state = find_targets(model, config).state_bytes
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        gradients=sum(p.numel() * p.element_size() for p in trainable),
        optimizer_state=state,
    )
