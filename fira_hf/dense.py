"""The step of weights that are not projected: torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch

from . import base_optimizers, int8
from .distributed import agree, local, sharded_like
from .matrices import by_device, operations, products_on
from .state import OF_MOMENTS, rounding_seed, rounds_state, rounds_weight, state_dtype_of


def create_dense(p: Any, group: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter that is not projected; `first` is its entry in `first_states`."""
    weight, dtype = local(p.detach()), state_dtype_of(group["state_dtype"])
    # No copies of one tensor of zeros, of which torch.compile would make one tensor.
    names = base_optimizers.MOMENTS["adamw"]
    moments = {name: sharded_like(p, torch.zeros_like(weight, dtype=dtype), p.shape) for name in names}
    return {"step": torch.zeros((), dtype=torch.float32, device=weight.device), **moments, **first}


def step_dense(parameters: list[Any], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """AdamW, which the device leaves out by itself where a gradient is not finite."""
    norms = torch._foreach_norm([local(p.grad) for p in parameters], 2.0, torch.float32)
    device = norms[0].device
    # Their squares, too: the norm of a single number is made without them.
    finite = agree(torch.stack([norm.to(device) for norm in norms]).square().isfinite().all(), parameters)
    steps = [state["step"] for state in states]
    # After infinitely many steps nothing is left of the bias.
    counts = torch._foreach_add(steps, 0.0 if group["correct_bias"] else torch.inf)
    settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    rows: list[tuple[Any, ...]] = []
    for p, s, count in zip(parameters, states, counts, strict=True):
        moments = [local(s[name]) for name in base_optimizers.MOMENTS["adamw"]]
        seed = rounding_seed(s) if rounds_weight(p, group) else None
        state_seed = rounding_seed(s, use=OF_MOMENTS) if rounds_state(group) else None
        weight, grad = int8.view(local(p.detach())), local(p.grad)
        if isinstance(weight, int8.Int8Weight):
            int8.dense_adamw(weight, grad, moments, count, finite.to(grad.device), seed, state_seed, settings)
        else:
            rows.append((weight, grad, *moments, count, seed, state_seed))
    for of_device in by_device(rows, lambda row: row[0].device):
        *columns, seeds, state_seeds = zip(*of_device, strict=True)
        weight = of_device[0][0]
        with products_on(weight):
            its_finite, ops = finite.to(weight.device), operations(weight)
            ops.dense_adamw(*map(list, columns), its_finite, list(seeds), list(state_seeds), settings)
    made = finite.float()
    torch._foreach_add_(steps, [made.to(step.device) for step in steps])
