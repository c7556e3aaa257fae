"""Measurements of the method on one weight and between two runs; nothing here changes what is measured.

The paper's claim (arXiv 2410.01623) is that a low-rank optimizer scales the parts of a weight as a full-rank one does.
The scaling factor of a row i of the long side (the paper's "column") and of a whole matrix are, with letters as in
`functional`,

    phi_i = ||N_i|| / (||R_i|| + 1e-8),      phi = ||N|| / (||R|| + 1e-8),      N = M / (sqrt(V) + eps)

where a full-rank run has R = G and the full moments. Neither run corrects the bias of the moments: as in the published
code, the factor is the one that Fira applies to the residual. The correction, left out of N, is a number that depends
on the step alone, the same for all weights of both runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import functional as F
from . import views
from .codes import FIRST, is_coded, negligible, value

# The residual's norm is computed again here, in another order of sums: a factor so close to 1 is no limit. Nor is one
# within an ulp of the moments where they are stored in less than fp32: the step had them before they were rounded.
ROUNDING = 1e-5


class Measurement(NamedTuple):
    """What one step did to a matrix, fp32 on its device; NaN where its gradient was zero or not finite.

    rows: (long,) phi of each row of the long side, NaN where its gradient was zero. matrix: phi of the whole.
    captured_energy: ||R||^2 / ||G||^2, 1 in a full-rank run. residual_norm: ||c S||, as the limiter left it;
    limiter: its factor c. Both are NaN in a full-rank run, and the former is infinite where S is negligible.
    """

    rows: Tensor
    matrix: Tensor
    captured_energy: Tensor
    residual_norm: Tensor
    limiter: Tensor


def check_matrix(p: Tensor, group: Mapping[str, Any]) -> None:
    """Raises ValueError for a weight, of this parameter group, that cannot be measured."""
    shape = tuple(p.shape)
    if isinstance(p, DTensor):
        raise ValueError(
            f"A weight of shape {shape} is sharded, and its scaling factors need whole rows: analyse on one device or "
            "under DDP."
        )
    if p.ndim != 2 or group.get("split", 1) > 1:
        raise ValueError(
            f"A weight of shape {shape} is no matrix by itself (split={group.get('split', 1)}): stacked and fused "
            "weights and convolutions cannot be analysed; leave them out of target_modules, target_parameters and "
            "split_pattern."
        )
    if group.get("base_optimizer", "adamw") != "adamw":
        raise ValueError(
            f"base_optimizer={group['base_optimizer']!r} does not keep AdamW's moments, from which scaling factors "
            "are computed: analyse with base_optimizer='adamw'."
        )
    if group.get("projection") == "columns":
        raise ValueError(
            "projection='columns' keeps no basis, from which scaling factors are computed: analyse with another one."
        )


@torch.no_grad()
def measure(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], transposed: bool = False) -> Measurement:
    """Scaling factors of one weight, between `optimizer.step()` and the moment in which its gradient is cleared.

    Args:
        p: a matrix with the gradient of the step.
        state, group: `optimizer.state[p]` and the parameter group of p in a `FiraAdamW`, with or without `rank`, or in
            a `torch.optim.AdamW`. An empty state, of a weight that has had no gradient but zero, gives NaN.
        transposed: stored (in, out), which the group of a projected weight says itself.

    Raises:
        ValueError: the weight is sharded, or stacks or fuses several matrices, its base optimizer is not AdamW, or
            its subspace is a block of columns.
        RuntimeError: its gradient is gone.
    """
    check_matrix(p, group)
    if p.grad is None:
        raise RuntimeError(
            f"The gradient of a weight of shape {tuple(p.shape)} is gone: measure after optimizer.step() and before "
            'zero_grad(), and not with weights that are stepped in backward (optim="fira_layerwise").'
        )
    transposed = group.get("transposed", transposed)

    def tall(matrix: Tensor) -> Tensor:
        return views.tall(matrix.t() if transposed else matrix)

    G = tall(p.grad)
    nan = G.new_full((), torch.nan, dtype=torch.float32)
    if "exp_avg" not in state:
        return Measurement(nan.expand(len(G)), nan, nan, nan, nan)
    N = value(state, "exp_avg") / (value(state, "exp_avg_sq").sqrt() + group["eps"])
    G_norms = F.row_norms(G)
    if "basis" in state:
        Q = value(state, "basis")
        R_norms = F.row_norms(F.product(G, Q, Q.new_empty(len(G), Q.shape[1])))
        N_norms = F.row_norms(N)
    else:
        R_norms, N_norms = G_norms, F.row_norms(tall(N))
    rows, matrix = (F.residual_scale(N_norms, R_norms, scaling) for scaling in ("column", "matrix"))
    whole, inside = F.total_norms(G_norms), F.total_norms(R_norms)
    residual, limiter = nan, nan
    if "basis" in state:
        k = group["alpha"] if group["residual"] == "reference" else 1.0
        phi = F.residual_scale(N_norms, R_norms, group["scaling"])
        norm = F.residual_norm(phi, G_norms, R_norms, k, negligible=negligible(state))
        residual = state["residual_norm"]
        # The state keeps what the limiter left. An infinite norm is a negligible residual, which it leaves alone.
        factor = torch.where(torch.isfinite(norm), residual / norm, 1.0).view(())
        # Of a matrix of codes the norm is known better than its entries, to a quarter of their distance.
        ulp = 2.0**-FIRST.bits / 4 if is_coded(state, "exp_avg") else torch.finfo(state["exp_avg"].dtype).eps
        rounding = max(ROUNDING, ulp)
        limiter = torch.where((factor - 1).abs() < rounding, 1.0, factor)
    usable = F.are_usable(G_norms[None])[0]
    values = (matrix[0, 0], (inside / whole).square().view(()), residual, limiter)
    rows = torch.where(usable & (G_norms > 0), rows, nan).flatten()
    return Measurement(rows, *(torch.where(usable, value, nan) for value in values))


def sample_rows(name: str, long: int, count: int) -> Tensor:
    """`count` rows of the long side of a weight, or all if it has no more, in order: the same ones in every run."""
    if long <= count:
        return torch.arange(long)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randperm(long, generator=generator)[:count].sort().values
