"""What a step could be made of: candidates for the method, each a choice of moment, subspace and residual.

Slow and plain, with tensors of the weight's size: here a rule is tried, and what trains well is built in `fira_hf`. A
weight is seen with its long side first, (m, n), m >= n. From a moment comes X (Nesterov), and from that Z = X Q in a
subspace of rank r, whose singular values are brought near 1 by Muon's iteration. The residual is the rest, of the
gradient or of the moment. All is scaled as Muon's update is, by 0.2 sqrt(m): AdamW's learning rates serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fira_hf.base_optimizers import orthogonalized
from recipes.benchmarks.peers import TINY, Peer, decode, encode

# The settings of a candidate; methods name those that differ.
DEFAULTS: dict[str, Any] = {
    "moment": "low-rank",  # of R, begun anew or rotated with the subspace; "full": of the whole gradient
    "subspace": "power",  # "columns": a block of neighbouring ones, in turns; "blocks": all of them, each by itself
    "residual": "none",  # see RESIDUALS; of the moment where that is full, or else of the gradient
    "weight": 1.0,  # of the residual
    "bits": None,  # of a full moment: 8 or 4, in blocks of 32
    "nearest": False,  # its codes are rounded to the nearest, not at random
    "follows": "moment",  # what the leading directions are those of, with a full moment; or the "gradient"
    "ahead": True,  # the residual of a full moment is that of X, not of the moment itself
    "beta": 0.9,
    "after": None,  # "rows" or "outputs" of the update are brought to one size, as in NorMuon (2510.05491)
    "after_beta": 0.95,  # of the running mean square by which that is done
}


def unit(E: Tensor, dim: int) -> Tensor:
    """Rows (dim 1) or columns (dim 0) of norm 1."""
    return E / E.norm(dim=dim, keepdim=True).clamp(min=TINY)


# E (the rest), Z, N -> the residual. All but the first are brought to the norm of n - r singular values of 1.
RESIDUALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "phi": lambda E, Z, N: E * N.norm(dim=1, keepdim=True) / Z.norm(dim=1, keepdim=True).clamp(min=TINY),
    "plain": lambda E, Z, N: E,
    "rows": lambda E, Z, N: unit(E, 1),
    "columns": lambda E, Z, N: unit(E, 0),
    "rows-columns": lambda E, Z, N: unit(unit(E, 1), 0),
}


class Candidate(Peer):
    """`settings`: `rank`, `update_proj_gap`, and what differs from `DEFAULTS`."""

    def __init__(self, params: Any, lr: float, seed: int = 0, **settings: Any) -> None:
        unknown = set(settings) - set(DEFAULTS) - {"rank", "update_proj_gap"}
        if unknown:
            raise ValueError(f"A candidate has no {', '.join(sorted(unknown))}; it has {', '.join(DEFAULTS)}.")
        super().__init__(params, lr, **DEFAULTS | settings)
        self.generator = torch.Generator().manual_seed(seed)

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        wide = p.shape[0] < p.shape[1]
        update = self._direction(p.grad.T if wide else p.grad, state, group)
        update = update.T if wide else update
        if group["after"]:
            dim = 0 if wide and group["after"] == "rows" else 1  # rows: of the weight with its long side first
            mean = update.square().mean(dim, keepdim=True)
            state["of_rows"] = state.get("of_rows", mean).lerp(mean, 1 - group["after_beta"])
            norm = update.norm()
            update = update / state["of_rows"].sqrt().clamp(min=TINY)
            update = update * (norm / update.norm().clamp(min=TINY))
        return update

    def _direction(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        m, n = G.shape
        rank = min(group["rank"], n)
        step = state["step"] = state.get("step", -1) + 1
        whole = self._moment(state, G, group) if group["moment"] == "full" else None
        if group["subspace"] == "blocks":
            blocks = whole.view(m, n // rank, rank).transpose(0, 1)
            return 0.2 * math.sqrt(m) * orthogonalized(blocks).transpose(0, 1).reshape(m, n)
        of = G if whole is None else whole
        if step % group["update_proj_gap"] == 0:
            self._change_basis(of if group["follows"] == "moment" else G, state, rank, group)
        Q = state["basis"]
        R = of @ Q
        Z = self._moment(state, R, group) if whole is None else R
        N = orthogonalized(Z[None])[0]
        update = N @ Q.T
        if group["residual"] != "none":
            of = of if group["ahead"] else state["moment"]
            update = update + self._residual(of - of @ Q @ Q.T, Z, N, n - rank, group)
        return 0.2 * math.sqrt(m) * update

    def _moment(self, state: dict[str, Any], value: Tensor, group: dict[str, Any]) -> Tensor:
        """X of a first moment."""
        if "moment" not in state:
            state["moment"] = torch.zeros_like(value)
        M = state["moment"].lerp_(value, 1 - group["beta"])
        if group["bits"]:
            M.copy_(decode(*encode(M, 32, group["bits"], None if group["nearest"] else self.generator), M))
        return M.lerp(value, 1 - group["beta"])

    def _change_basis(self, of: Tensor, state: dict[str, Any], rank: int, group: dict[str, Any]) -> None:
        n = of.shape[1]
        before = state.get("basis")
        if group["subspace"] == "columns":
            if not state.get("turns"):
                state["turns"] = torch.randperm(n // rank, generator=self.generator).tolist()
            first = rank * state["turns"].pop()
            state["basis"] = torch.eye(n, device=of.device)[:, first : first + rank]
        else:
            Q = torch.randn(n, rank, generator=self.generator).to(of.device) if before is None else before
            for _ in range(3 if before is None else 1):
                Q = torch.linalg.qr(of.T @ (of @ Q)).Q
            state["basis"] = Q
        if before is not None and group["moment"] == "low-rank":
            state["moment"] = state["moment"] @ (before.T @ state["basis"])

    def _residual(self, E: Tensor, Z: Tensor, N: Tensor, left: int, group: dict[str, Any]) -> Tensor:
        S = RESIDUALS[group["residual"]](E, Z, N)
        if group["residual"] != "phi":
            S = S * (math.sqrt(left) / S.norm().clamp(min=TINY))
        return S * group["weight"]
