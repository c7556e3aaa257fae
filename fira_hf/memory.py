"""Bytes of training by component, from shapes alone: nothing is allocated, so a model on the meta device will do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import FiraConfig
from .targets import Target, TargetPlan, find_targets

FP32 = 4


@dataclass
class MemoryEstimate:
    """Bytes on one device, without activations."""

    weights: int
    gradients: int
    optimizer_state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state


def projected_state_bytes(target: Target) -> int:
    """State of one projected weight: basis, two moments, and the scalars `step` and `residual_norm`; all fp32."""
    long, short = max(target.parameter.shape), min(target.parameter.shape)
    return FP32 * (short * target.rank + 2 * long * target.rank + 2)


def dense_state_bytes(parameter: nn.Parameter) -> int:
    """State of one weight that `FiraAdamW` does not project: two moments and `step`; all fp32."""
    return FP32 * (2 * parameter.numel() + 1)


def adamw_state_bytes(parameter: nn.Parameter) -> int:
    """State of one weight in `torch.optim.AdamW`: two moments in the weight's own dtype, and an fp32 `step`."""
    return 2 * parameter.numel() * parameter.element_size() + FP32


def fira_state_bytes(plan: TargetPlan) -> int:
    """Optimizer state of `FiraAdamW` once every weight of the plan has had a gradient."""
    return sum(map(projected_state_bytes, plan.projected)) + sum(dense_state_bytes(s.parameter) for s in plan.skipped)


def estimate_memory(model: nn.Module, config: FiraConfig | None) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer state: Fira by the config, or torch's AdamW where it is None."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config is None:
        state = sum(map(adamw_state_bytes, trainable))
    else:
        state = fira_state_bytes(find_targets(model, config))
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        gradients=sum(p.numel() * p.element_size() for p in trainable),
        optimizer_state=state,
    )
