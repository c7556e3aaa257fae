"""Every optimizer that the benchmarks compare, on given matrices, at the settings that its authors publish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fira_hf import FiraAdamW

Matrices = list[nn.Parameter]


def build(name: str, matrices: Matrices, lr: float, rank: int, gap: int, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer `name` on the matrices; `settings` are further keys of its parameter group.

    Raises:
        ValueError: there is no such optimizer.
        ImportError: its package is not installed.
    """
    if name not in BUILDERS:
        raise ValueError(f"There is no optimizer {name!r}; there are {', '.join(BUILDERS)}.")
    return BUILDERS[name](matrices, lr, rank, gap, settings)


def _adamw(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(matrices, lr=lr, **{"weight_decay": 0.0, "fused": True} | settings)


def _adamw_foreach(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]):
    return _adamw(matrices, lr, rank, gap, {"fused": False, "foreach": True} | settings)


def _muon(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    # match_rms_adamw: steps of AdamW's size, so that AdamW's learning rates carry over.
    return torch.optim.Muon(matrices, lr=lr, **{"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | settings)


def _galore(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"} | settings
    return GaLoreAdamW([{"params": matrices, **group}], lr=lr, no_deprecation_warning=True)


def _apollo(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    group = {"rank": rank, "update_proj_gap": gap, "scale": 1.0, "scale_type": "channel"}
    group |= {"proj": "random", "proj_type": "std"} | settings
    return APOLLOAdamW([{"params": matrices, **group}], lr=lr)


def _fira(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    import fira

    group = {"rank": rank, "update_proj_gap": gap, "alpha": 0.25, "proj_type": "std"} | settings
    return fira.FiraAdamW([{"params": matrices, **group}], lr=lr, no_deprecation_warning=True)


def _pytorch_optimizer(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]):
    from pytorch_optimizer import Fira

    group = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "projection_type": "std"} | settings
    return Fira([{"params": matrices, **group}], lr=lr)


def _fira_hf(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return FiraAdamW([{"params": matrices, "rank": rank, "update_proj_gap": gap, "alpha": 0.25, **settings}], lr=lr)


def _dense(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return FiraAdamW([{"params": matrices, **settings}], lr=lr)  # AdamW with fp32 moments, whatever the weights


BUILDERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-foreach": _adamw_foreach,
    "muon": _muon,
    "galore-torch": _galore,
    "apollo-torch": _apollo,
    "fira": _fira,
    "pytorch-optimizer": _pytorch_optimizer,
    "fira_hf": _fira_hf,
    "fira_hf-dense": _dense,
}
