"""Every optimizer that the benchmarks compare, on given matrices, at the settings that its authors publish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fira_hf import FiraAdamW
from recipes.benchmarks import peers
from recipes.benchmarks.candidates import Candidate

Matrices = list[nn.Parameter]


def build(name: str, matrices: Matrices, lr: float, rank: int, gap: int, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer `name` on the matrices; `settings` are further keys of its parameter group.

    Raises:
        ValueError: there is no such optimizer.
        ImportError: its package is not installed.
    """
    builders = BUILDERS | QUALITY
    if name not in builders:
        raise ValueError(f"There is no optimizer {name!r}; there are {', '.join(builders)}.")
    return builders[name](matrices, lr, rank, gap, settings)


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


def _adamw_8bit(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]):
    from bitsandbytes.optim import AdamW8bit

    # Smaller matrices than the default's 4,096 weights would silently keep moments in fp32.
    return AdamW8bit(matrices, lr=lr, **{"weight_decay": 0.0, "min_8bit_size": 0} | settings)


def _int8_muon(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | settings
    return peers.Int8Muon(matrices, lr=lr, **options)


def _sinkgd(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return peers.SinkGD(matrices, lr, **settings)


def _scale(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return peers.Scale(matrices, lr, **settings)


def _sumo(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return peers.Sumo(matrices, lr, **{"rank": rank, "update_proj_gap": gap, "momentum": 0.95} | settings)


def _frugal(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    group = {"rank": rank, "update_proj_gap": gap, "betas": (0.9, 0.999), "eps": 1e-8, "free_scale": 1.0}
    return peers.Frugal(matrices, lr, **group | settings)


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


# Compared by `quality` alone: their steps are not written to be timed.
def _candidate(matrices: Matrices, lr: float, rank: int, gap: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return Candidate(matrices, lr, rank=rank, update_proj_gap=gap, **settings)


QUALITY: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw-8bit": _adamw_8bit,
    "muon-int8": _int8_muon,
    "sinkgd": _sinkgd,
    "scale": _scale,
    "sumo": _sumo,
    "frugal": _frugal,
    "candidate": _candidate,
}
