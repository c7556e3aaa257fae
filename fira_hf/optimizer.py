"""`FiraAdamW`: validates parameter groups, holds the state, loops. The mathematics is in `functional`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import functional as F
from .config import FiraConfig, check_setting, unknown_name
from .subspace import find_basis

logger = logging.getLogger(__name__)

# Settings of a projected group beside its rank, with their defaults.
PROJECTED_DEFAULTS: dict[str, Any] = {
    name: FiraConfig.__dataclass_fields__[name].default
    for name in ("alpha", "update_proj_gap", "gamma", "projection", "scaling", "residual")
}
ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS = ("limiter_active", "captured_energy", "residual_share")


class FiraAdamW(torch.optim.Optimizer):
    """AdamW in which the weights of some groups are trained by Fira (arXiv 2410.01623): moments in a low-rank subspace
    of the gradient, and the rest of the gradient, scaled and limited in growth, applied beside them.

    A group with the key `rank` is projected; its parameters are matrices, and it may set `alpha` (1.0),
    `update_proj_gap` (200), `gamma` (1.01, or None), `projection` ("svd"), `scaling` ("column", "matrix", "none") and
    `residual` ("reference", "paper"); see `FiraConfig` for what they mean. A group without `rank` is AdamW by torch's
    formulas. With the defaults and fp32 weights, projected groups follow `fira==1.0.2` step for step.

    State, created at a weight's first gradient that is finite and not zero (long >= short: sides of the weight;
    r = min(rank, short); fp32 whatever the weight's dtype, and kept so by `load_state_dict`):

        step           0-dim           updates made (fp32, on the weight's device)
        refresh_in     int             calls of `step()` that can pass before the basis may be due
        basis          short x r       orthonormal columns
        exp_avg        long x r        first moment of G Q
        exp_avg_sq     long x r        second moment of G Q
        residual_norm  0-dim           norm of the last residual, as limited; infinite: none, or a negligible one

    A weight of a group without `rank` has `step`, `exp_avg` and `exp_avg_sq`, of its own shape, fp32.

    A gradient that is zero, or not finite (or so large that its square is not, in fp32), changes nothing of a
    projected weight and its state. A group without `rank` is passed over for a step in which one of its gradients is
    not finite. Ordinary steps do not synchronise an accelerator with the host; one that may refresh a basis does.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. A projected weight decays after its update.

    Raises:
        ValueError: a setting is unknown or not valid, a parameter is not of fp32, bf16 or fp16, or one of a projected
            group is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        # What the factory knows of the model, for logs and checkpoints; None where groups were made by hand.
        self.config: FiraConfig | None = None
        self.summary: str | None = None
        # Where set, each step adds what `pop_statistics` averages, at the price of a few scalar operations a matrix.
        self.track_statistics = False
        self._sums: dict[torch.device, Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        own = ("config", "summary", "track_statistics", "_sums")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        own = {"params", "param_names", "initial_lr", *ADAM_SETTINGS}
        valid = [*ADAM_SETTINGS, "rank", *PROJECTED_DEFAULTS]
        for name in group.keys() - own:
            if name not in valid:
                raise ValueError(f"Parameter group: {unknown_name('setting', name, valid)}")
            if "rank" not in group:
                raise ValueError(f"Parameter group: {name}={group[name]!r} has no effect in a group without 'rank'.")
        for name in valid if "rank" in group else ADAM_SETTINGS:
            check_setting(name, group.setdefault(name, PROJECTED_DEFAULTS.get(name)))
        group["betas"] = tuple(group["betas"])
        for index, parameter in enumerate(group["params"]):
            name = group["param_names"][index] if "param_names" in group else f"parameter {index}"
            if parameter.dtype not in DTYPES:
                raise ValueError(
                    f"Parameter group: {name} is of dtype {parameter.dtype}, but FiraAdamW trains only "
                    f"{', '.join(map(str, DTYPES))}: convert the model."
                )
            if "rank" in group and parameter.ndim != 2:
                raise ValueError(
                    f"Parameter group: {name} of shape {tuple(parameter.shape)} cannot be projected, only matrices "
                    "can: put it into a group without 'rank'."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step and returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p.grad.is_sparse:
                    raise RuntimeError("FiraAdamW does not take sparse gradients: use sparse=False in the embedding.")
                if hasattr(p, "device_mesh") or ("rank" in group and p.ndim != 2):
                    raise RuntimeError(
                        "FiraAdamW cannot train sharded or flattened weights (FSDP, DeepSpeed, tensor parallel): use "
                        "one device or DDP."
                    )
            if not parameters:
                continue
            # Under autocast the products would be taken in half precision.
            with torch.autocast(parameters[0].device.type, enabled=False):
                if "rank" in group:
                    for p in parameters:
                        self._step_projected(p, group)
                else:
                    self._step_dense(parameters, group)
        return loss

    def _step_projected(self, p: Tensor, group: dict[str, Any]) -> None:
        grad = p.grad
        assert grad is not None
        state, W, G = self.state.get(p, {}), F.tall(p), F.tall(grad)
        G_norms = F.row_norms(G)
        active: Tensor | None = F.is_usable(G_norms)
        # On the CPU a look at the gradient costs nothing. Elsewhere the host looks only where a basis may be due;
        # in an ordinary step the device decides by itself.
        refreshable = state.get("refresh_in", 0) == 0
        if refreshable or p.device.type == "cpu":
            if not active:
                return
            active = None
        if refreshable:
            self._refresh(state, grad, group)
            if not state:
                return
            self.state[p] = state
        state["refresh_in"] -= 1
        state["step"].add_(1.0 if active is None else active)
        t = state["step"].item() if p.device.type == "cpu" else state["step"]
        eta = F.step_size(group["lr"], group["betas"], t)

        R = F.project(G, state["basis"])
        if active is not None:
            R, G_norms, eta = (torch.where(active, x, 0.0) for x in (R, G_norms, eta))
        N = F.direction(R, state["exp_avg"], state["exp_avg_sq"], group["betas"], group["eps"], active)
        R_norms, N_norms = F.row_norms(R), F.row_norms(N)

        # (s, k) of `functional`: how alpha enters the residual.
        alpha = group["alpha"]
        s, k = (1.0, alpha) if group["residual"] == "reference" else (alpha, 1.0)
        phi = F.residual_scale(N_norms, R_norms, group["scaling"])
        norm = F.residual_norm(phi, G_norms, R_norms, k)
        c, limited_norm = F.limit(norm, state["residual_norm"], group["gamma"])
        if active is not None:
            limited_norm = torch.where(active, limited_norm, state["residual_norm"])
        state["residual_norm"].copy_(limited_norm)

        B = phi * (s * c * eta)
        A = N.mul_(alpha * eta).addcmul_(B, R, value=-k)
        F.apply_update(W, G, A, state["basis"], B, 1 - group["lr"] * group["weight_decay"], active)
        if self.track_statistics:
            self._add_statistics(G_norms, R_norms, alpha * N_norms, s * c * norm, c, active)

    def _refresh(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> None:
        """Finds a basis where it is due, and creates the state with the first one. Reads `step` on the host."""
        gap = group["update_proj_gap"]
        done = int(state["step"].item()) % gap if state else 0
        Q = find_basis(grad, group["rank"], group["projection"]) if done == 0 else None
        if Q is not None:
            state["basis"] = Q
            if "step" not in state:
                moments = {name: Q.new_zeros(max(grad.shape), Q.shape[1]) for name in ("exp_avg", "exp_avg_sq")}
                state.update(moments, step=Q.new_zeros(()), residual_norm=Q.new_full((), torch.inf))
        if state:
            state["refresh_in"] = gap - done

    def _step_dense(self, parameters: list[Any], group: dict[str, Any]) -> None:
        """torch's fused AdamW, which leaves everything as it is on the device where `found_inf` is 1."""
        norms = torch._foreach_norm([p.grad for p in parameters], 2.0, torch.float32)
        device = parameters[0].device
        finite = torch.isfinite(torch.stack([norm.to(device) for norm in norms])).all()
        settings: dict[str, Any] = {
            "fused": True,
            "found_inf": (~finite).float(),
            "amsgrad": False,
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "maximize": False,
        }
        states = []
        for p in parameters:
            if p not in self.state:
                moments = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            states.append(self.state[p])

        # The kernel wants one dtype and one memory layout. A weight that differs from its gradient or moments in
        # either is updated in blocks of its rows, in fp32, and rounded once.
        plain: list[tuple[Tensor, ...]] = []
        others: list[tuple[Tensor, ...]] = []
        for p, state in zip(parameters, states, strict=True):
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            alike = all(x.dtype == torch.float32 and x.stride() == p.stride() for x in tensors)
            (plain if alike else others).append((*tensors, state["step"]))
        if plain:
            weights, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*plain, strict=True))
            adamw(weights, grads, exp_avgs, exp_avg_sqs, [], steps, **settings)
        for *parts, step in others:
            for w, g, m, v in zip(*(F.row_blocks(torch.atleast_1d(x)) for x in parts), strict=True):
                new_w, new_g, new_m, new_v = (
                    x.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for x in (w, g, m, v)
                )
                count = step.clone()
                adamw([new_w], [new_g], [new_m], [new_v], [], [count], **settings)
                w.copy_(new_w)
                m.copy_(new_m)
                v.copy_(new_v)
            step.copy_(count)

    def _add_statistics(
        self, G_norms: Tensor, R_norms: Tensor, low_norms: Tensor, residual: Tensor, c: Tensor, active: Tensor | None
    ) -> None:
        energy = R_norms.square().sum() / G_norms.square().sum()
        # An infinite residual norm stands for a negligible one.
        residual_sq = torch.where(torch.isfinite(residual), residual, 0.0).square()
        share = residual_sq / (residual_sq + low_norms.square().sum())
        row = torch.stack([torch.ones_like(c), (c < 1).float(), energy, share])
        if active is not None:
            row = torch.where(active, row, 0.0)
        total = self._sums.get(row.device)
        self._sums[row.device] = row if total is None else total.add_(row)

    def pop_statistics(self) -> dict[str, float]:
        """Means over the projected matrices and the steps since the last call; empty if there were none.

        limiter_active: share of the residuals that the norm-growth limiter scaled down. captured_energy:
        ||R||^2 / ||G||^2, the share of the gradient's energy that lies in the subspace. residual_share:
        ||S||^2 / (||alpha N||^2 + ||S||^2), the residual's part of the update. Reads the device; set
        `track_statistics` before the steps of interest.
        """
        sums = sum(total.cpu().double() for total in self._sums.values())
        self._sums.clear()
        if not torch.is_tensor(sums) or sums[0] == 0:
            return {}
        return dict(zip(STATISTICS, (sums[1:] / sums[0]).tolist(), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as saved, in the dtype in which it was saved (torch would cast it to that of the weight).

        As everywhere in torch, lr, betas, eps and weight_decay come from the checkpoint.

        Raises:
            ValueError: the checkpoint projects other weights than this optimizer, or with other settings.
        """
        self._check_checkpoint(state_dict)
        super().load_state_dict(state_dict)
        for index, p in self._pairs(state_dict):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        named = all("param_names" in group for group in [*saved_groups, *self.param_groups])
        saved, own = _projected(saved_groups, named), _projected(self.param_groups, named)
        if named and saved.keys() == own.keys():
            for old, new in zip(saved_groups, self.param_groups, strict=False):
                if len(old["params"]) == len(new["params"]) and old["param_names"] != new["param_names"]:
                    raise ValueError(
                        "The checkpoint has the same weights in another order or in other groups: build the optimizer "
                        "as it was built for the checkpoint."
                    )
        sides = (("The checkpoint", "this optimizer", saved, own), ("This optimizer", "the checkpoint", own, saved))
        for one, other, names, known in sides:
            extra = sorted(names.keys() - known.keys())
            if extra:
                more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
                raise ValueError(
                    f"{one} projects {', '.join(extra[:3])}{more}, which {other} does not: resume with the same "
                    "target modules, or start a new run from the weights."
                )
        for name, settings in own.items():
            for setting, value in settings.items():
                was = saved[name].get(setting)
                if was != value:
                    raise ValueError(
                        f"The checkpoint was made with {setting}={was!r} for {name}, this optimizer has "
                        f"{setting}={value!r}: resume with {setting}={was!r}, or start a new run from the weights."
                    )
        for index, p in self._pairs(state_dict):
            state = state_dict["state"].get(index, {})
            expected = (max(p.shape), min(p.shape)) if "basis" in state else p.shape
            shape = (len(state["exp_avg"]), len(state["basis"])) if "basis" in state else state.get("exp_avg", p).shape
            if tuple(shape) != tuple(expected):
                raise ValueError(
                    f"The checkpoint holds the state of a weight of another shape than this model's {tuple(p.shape)}: "
                    "resume with the model that it was made with."
                )
        for old, new in zip(saved_groups, self.param_groups, strict=False):
            for setting in ("initial_lr", "betas", "eps", "weight_decay"):
                if setting in old and setting in new and old[setting] != new[setting]:
                    logger.warning("%s=%s of the checkpoint replaces %s.", setting, old[setting], new[setting])

    def _pairs(self, state_dict: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """Index in the state dict and parameter here, for each; torch refuses another number of them by itself."""
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        own = (p for group in self.param_groups for p in group["params"])
        return list(zip(saved, own, strict=False))


def _projected(groups: list[dict[str, Any]], named: bool) -> dict[str, dict[str, Any]]:
    """Name (or position) of each projected parameter -> the settings of its projection."""
    return {
        group["param_names"][i] if named else f"parameter {i} of group {g}": {
            name: group.get(name) for name in ("rank", *PROJECTED_DEFAULTS)
        }
        for g, group in enumerate(groups)
        if "rank" in group
        for i in range(len(group["params"]))
    }
