"""`FiraAdamW`: validates parameter groups, holds the state, loops. The mathematics is in `functional`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import functional as F
from .checkpoint import check_checkpoint, pairs
from .config import PROJECTED_DEFAULTS, SHARED_DEFAULTS, FiraConfig, check_setting, unknown_name
from .subspace import find_bases, nearest_rotation

ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
# Matrices of one shape are taken together up to this many elements of their low-rank gradients: 4 MiB on the CPU,
# elsewhere enough that starting the operations does not take longer than the operations.
BATCH = {"cpu": 2**20}
BATCH_ELSEWHERE = 2**22
# Parameter -> the plain numbers that its state begins with.
Places = dict[Any, dict[str, Any]]
STATISTICS = ("limiter_active", "captured_energy", "residual_share")


class FiraAdamW(torch.optim.Optimizer):
    """AdamW in which the weights of some groups are trained by Fira (arXiv 2410.01623): moments in a low-rank subspace
    of the gradient, and the rest of the gradient, scaled and limited in growth, applied beside them.

    A group with the key `rank` is projected; its parameters are matrices, or stacks of matrices (3-D, such as the
    experts of a layer) of which each is projected by itself; it may set `alpha`, `update_proj_gap`,
    `gamma`, `projection`, `refresh`, `moments`, `scaling` and `residual`, which mean and default to what they do in
    `FiraConfig`. A group without `rank` is AdamW by torch's formulas. Every group may set `state_dtype` and
    `stochastic_rounding`. With `projection="svd"`, `refresh="together"`, `moments="kept"` and fp32 weights, projected
    groups follow `fira==1.0.2` step for step.

    State, created at a weight's first gradient that is finite and not zero (long >= short: sides of the weight;
    r = min(rank, short); moments and basis of `state_dtype`, whatever the weight's dtype, the scalars fp32; all kept
    so by `load_state_dict`):

        step           0-dim           updates made (fp32, on the weight's device)
        phase          int             the basis is due at updates `phase`, `phase` + `update_proj_gap`, ...
        refresh_in     int             calls of `step()` that can pass before the basis may be due
        seed           int             of what is drawn at random next
        basis          short x r       orthonormal columns
        exp_avg        long x r        first moment of G Q
        exp_avg_sq     long x r        second moment of G Q
        residual_norm  0-dim           norm of the last residual, as limited; infinite: none, or a negligible one

    The state of a stack has one more dimension in front, and lists of `phase` and `refresh_in`; `refresh_in` is None
    for a matrix that has had no gradient yet.

    A weight of a group without `rank` has `step`, `seed`, and `exp_avg` and `exp_avg_sq` of its own shape.

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
        general = [*ADAM_SETTINGS, *SHARED_DEFAULTS]
        own = {"params", "param_names", "initial_lr", *general}
        valid = [*general, "rank", *PROJECTED_DEFAULTS]
        for name in group.keys() - own:
            if name not in valid:
                raise ValueError(f"Parameter group: {unknown_name('setting', name, valid)}")
            if "rank" not in group:
                raise ValueError(f"Parameter group: {name}={group[name]!r} has no effect in a group without 'rank'.")
        for name in valid if "rank" in group else general:
            check_setting(name, group.setdefault(name, {**SHARED_DEFAULTS, **PROJECTED_DEFAULTS}.get(name)))
        group["betas"] = tuple(group["betas"])
        for index, parameter in enumerate(group["params"]):
            name = group["param_names"][index] if "param_names" in group else f"parameter {index}"
            if parameter.dtype not in DTYPES:
                raise ValueError(
                    f"Parameter group: {name} is of dtype {parameter.dtype}, but FiraAdamW trains only "
                    f"{', '.join(map(str, DTYPES))}: convert the model."
                )
            if group["stochastic_rounding"] and parameter.dtype == torch.float16:
                raise ValueError(
                    f"Parameter group: stochastic_rounding=True is for bf16 weights, but {name} is of fp16: convert "
                    "the model to bf16, or leave it out."
                )
            if "rank" in group and parameter.ndim not in (2, 3):
                raise ValueError(
                    f"Parameter group: {name} of shape {tuple(parameter.shape)} cannot be projected, only matrices "
                    "and stacks of them (3-D) can: put it into a group without 'rank'."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step and returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places: Places | None = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if places is None and any(not self.state.get(p) for p in parameters):
                places = self._places()
            self._step_parameters(group, parameters, places or {})
        return loss

    def _step_parameters(self, group: dict[str, Any], parameters: list[Any], places: Places) -> None:
        """One step of some parameters of a group, each of which has a gradient."""
        for p in parameters:
            if p.grad.is_sparse:
                raise RuntimeError("FiraAdamW does not take sparse gradients: use sparse=False in the embedding.")
            if hasattr(p, "device_mesh") or ("rank" in group and p.ndim not in (2, 3)):
                raise RuntimeError(
                    "FiraAdamW cannot train sharded or flattened weights (FSDP, DeepSpeed, tensor parallel): use "
                    "one device or DDP."
                )
        if not parameters:
            return
        # Under autocast the products would be taken in half precision.
        with torch.autocast(parameters[0].device.type, enabled=False):
            if "rank" in group:
                matrices = [matrix for p in parameters for matrix in _matrices(p, self.state.get(p))]
                for batch in _batches(matrices, group["rank"]):
                    self._step_projected(batch, group, places)
            else:
                self._step_dense(parameters, group, places)

    def _places(self) -> Places:
        """The plain numbers that each parameter's state begins with, from its place among all parameters.

        seed: for what is drawn at random. phase: the update, counted from 0, before which the basis is first
        refreshed, and then every `update_proj_gap`; staggered, so that each update has its share of the work.
        """
        places: Places = {}
        staggered = [group for group in self.param_groups if group.get("refresh") == "staggered"]
        total = sum(p.numel() * group["rank"] for group in staggered for p in group["params"])
        before = 0
        for group in self.param_groups:
            for p in group["params"]:
                places[p] = {"seed": len(places)}
                if "rank" not in group:
                    continue
                phases = []
                for _ in range(len(p) if p.ndim == 3 else 1):
                    phases.append(0)
                    if group["refresh"] == "staggered":
                        phases[-1] = 1 + group["update_proj_gap"] * before // total
                        before += p.shape[-2] * p.shape[-1] * group["rank"]
                places[p]["phase"] = phases if p.ndim == 3 else phases[0]
        return places

    def _step_projected(self, matrices: list[_Matrix], group: dict[str, Any], places: Places) -> None:
        """One step of matrices of one shape and dtype; what is low-rank is stacked along a first dimension."""
        refreshable = [matrix for matrix in matrices if not matrix.begun or matrix["refresh_in"] == 0]
        if refreshable:
            norms = torch.stack([F.row_norms(F.tall(matrix.grad)) for matrix in refreshable])
            usable = F.are_usable(norms).tolist()
            self._refresh([matrix for matrix, ok in zip(refreshable, usable, strict=True) if ok], group, places)
        matrices = [matrix for matrix in matrices if matrix.begun]
        if not matrices:
            return
        grads = [F.tall(matrix.grad) for matrix in matrices]
        bases = [matrix["basis"].float() for matrix in matrices]
        R = bases[0].new_empty(len(grads), len(grads[0]), bases[0].shape[1])
        row_norms = []
        for G, Q, out in zip(grads, bases, R, strict=True):
            F.project(G, Q, out)
            row_norms.append(F.row_norms(G))  # now, while the gradient is in the cache
        G_norms = torch.stack(row_norms)

        active: Tensor | None = F.are_usable(G_norms)
        assert active is not None
        if matrices[0].parameter.device.type == "cpu":
            # Here a look at the gradients costs nothing. Elsewhere the device decides by itself.
            keep = active.nonzero().flatten().tolist()
            if not keep:
                return
            if len(keep) < len(matrices):
                R, G_norms = R[keep], G_norms[keep]
                matrices, grads, bases = ([x[i] for i in keep] for x in (matrices, grads, bases))
            active = None
        for matrix in matrices:
            matrix["refresh_in"] = max(0, matrix["refresh_in"] - 1)
        steps = [matrix["step"] for matrix in matrices]
        torch._foreach_add_(steps, 1.0 if active is None else list(active.float()))
        eta = F.step_size(group["lr"], group["betas"], torch.stack(steps).view(-1, 1, 1))
        if active is not None:
            mask = active.view(-1, 1, 1)
            R, G_norms, eta = (torch.where(mask, x, 0.0) for x in (R, G_norms, eta))
        stored = [[matrix[name] for matrix in matrices] for name in MOMENTS]
        M, V = ([moment.float() for moment in moments] for moments in stored)
        N = F.direction(R, M, V, group["betas"], group["eps"], active)
        R_norms, N_norms = F.row_norms(R), F.row_norms(N)

        # (s, k) of `functional`: how alpha enters the residual.
        alpha = group["alpha"]
        s, k = (1.0, alpha) if group["residual"] == "reference" else (alpha, 1.0)
        phi = F.residual_scale(N_norms, R_norms, group["scaling"])
        norm = F.residual_norm(phi, G_norms, R_norms, k)
        histories = [matrix["residual_norm"] for matrix in matrices]
        previous = torch.stack(histories).view(-1, 1, 1)
        c, limited_norm = F.limit(norm, previous, group["gamma"])
        if active is not None:
            limited_norm = torch.where(mask, limited_norm, previous)
        torch._foreach_copy_(histories, list(limited_norm.flatten()))

        B = phi * (s * c * eta)
        A = N.mul_(alpha * eta).addcmul_(B, R, value=-k)
        decay = 1 - group["lr"] * group["weight_decay"]
        for i, (matrix, G) in enumerate(zip(matrices, grads, strict=True)):
            on = None if active is None else active[i]
            generator = _generator(matrix.parameter, matrix.state, group)
            for moments, new in zip(stored, (M, V), strict=True):
                F.store(moments[i], new[i], generator)
            at_random = generator if group["stochastic_rounding"] else None
            F.apply_update(F.tall(matrix.weight), G, A[i], bases[i], B[i], decay, on, at_random)
        if self.track_statistics:
            self._add_statistics(G_norms, R_norms, alpha * N_norms, s * c * norm, c, active)

    def _refresh(self, matrices: list[_Matrix], group: dict[str, Any], places: Places) -> None:
        """Finds the bases that are due, and creates the state with the first one. Reads `step` on the host."""
        gap = group["update_proj_gap"]
        due: dict[str, list[tuple[_Matrix, int]]] = defaultdict(list)
        for matrix in matrices:
            if not matrix.state:
                matrix.state.update(places[matrix.parameter])
            done = int(matrix["step"].item()) if matrix.begun else 0
            wait = (matrix["phase"] - done) % gap or gap
            if not matrix.begun:
                # All need their first basis at once: where refreshes are staggered, it has to be a cheap one.
                due["sketch" if group["refresh"] == "staggered" else group["projection"]].append((matrix, wait))
            elif wait == gap:
                due[group["projection"]].append((matrix, wait))
            else:
                matrix["refresh_in"] = wait
        for method, chosen in due.items():
            grads = [matrix.grad for matrix, _ in chosen]
            previous = [matrix["basis"].float() if matrix.begun else None for matrix, _ in chosen]
            seeds = [_next_seed(matrix.state) for matrix, _ in chosen]
            bases = find_bases(grads, group["rank"], method, previous, seeds)
            for (matrix, wait), Q_old, Q in zip(chosen, previous, bases, strict=True):
                if Q is not None and Q_old is None:
                    self._begin(matrix, Q, group)
                elif Q is not None and Q_old is not None:
                    self._change_basis(matrix, Q_old, Q, group)
                if matrix.begun:
                    matrix["refresh_in"] = wait

    def _begin(self, matrix: _Matrix, Q: Tensor, group: dict[str, Any]) -> None:
        p, state = matrix.parameter, matrix.state
        if "basis" not in state:
            dtype = getattr(torch, group["state_dtype"])
            stack, short, long = p.shape[:-2], *sorted(p.shape[-2:])
            state["refresh_in"] = [None] * len(p) if stack else None
            state |= {name: Q.new_zeros(*stack, long, Q.shape[1], dtype=dtype) for name in MOMENTS}
            state["step"] = Q.new_zeros(stack)
            state["residual_norm"] = Q.new_full(stack, torch.inf)
            state["basis"] = Q.new_zeros(*stack, Q.shape[1], short, dtype=dtype).mT
            self.state[p] = state
        matrix["refresh_in"] = 0
        matrix["basis"].copy_(Q)

    def _change_basis(self, matrix: _Matrix, Q_old: Tensor, Q: Tensor, group: dict[str, Any]) -> None:
        C = Q_old.t() @ Q
        if group["moments"] == "aligned":
            Q = Q @ nearest_rotation(C.t())
        elif group["moments"] == "rotated":
            b1, b2 = (F.bias_correction(beta, matrix["step"]) for beta in group["betas"])
            M, V = (matrix[name].float() for name in MOMENTS)
            F.rotate_moments(M, V, C, b2 / b1.square())
            generator = _generator(matrix.parameter, matrix.state, group)
            for name, new in zip(MOMENTS, (M, V), strict=True):
                F.store(matrix[name], new, generator)
        matrix["basis"].copy_(Q)

    def _step_dense(self, parameters: list[Any], group: dict[str, Any], places: Places) -> None:
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
            if not self.state.get(p):
                dtype = getattr(torch, group["state_dtype"])
                moments = {name: torch.zeros_like(p, dtype=dtype) for name in MOMENTS}
                self.state[p] = {"step": torch.zeros((), device=p.device), **moments, **places[p]}
            states.append(self.state[p])

        # The kernel wants one dtype and one memory layout. A weight that differs from its gradient or moments in
        # either is updated in blocks of its rows, in fp32, and rounded once.
        plain: list[tuple[Tensor, ...]] = []
        others: list[tuple[Any, dict[str, Any]]] = []
        for p, state in zip(parameters, states, strict=True):
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            if all(x.dtype == torch.float32 and x.stride() == p.stride() for x in tensors):
                plain.append((*tensors, state["step"]))
            else:
                others.append((p, state))
        if plain:
            weights, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*plain, strict=True))
            adamw(weights, grads, exp_avgs, exp_avg_sqs, [], steps, **settings)
        for p, state in others:
            generator = _generator(p, state, group)
            at_random = generator if group["stochastic_rounding"] else None
            parts = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            for w, g, m, v in zip(*(F.row_blocks(torch.atleast_1d(x)) for x in parts), strict=True):
                new_w, new_g, new_m, new_v = (
                    x.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for x in (w, g, m, v)
                )
                count = state["step"].clone()
                adamw([new_w], [new_g], [new_m], [new_v], [], [count], **settings)
                F.store(w, new_w, at_random)
                F.store(m, new_m, generator)
                F.store(v, new_v, generator)
            state["step"].copy_(count)

    def _add_statistics(
        self, G_norms: Tensor, R_norms: Tensor, low_norms: Tensor, residual: Tensor, c: Tensor, active: Tensor | None
    ) -> None:
        energy = F.total_norms(R_norms).square() / F.total_norms(G_norms).square()
        # An infinite residual norm stands for a negligible one.
        residual_sq = torch.where(torch.isfinite(residual), residual, 0.0).square()
        share = residual_sq / (residual_sq + F.total_norms(low_norms).square())
        columns = torch.cat([torch.ones_like(c), (c < 1).float(), energy, share], dim=1).flatten(1)
        row = (columns if active is None else torch.where(active[:, None], columns, 0.0)).sum(0)
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
        check_checkpoint(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        for index, p in pairs(state_dict, self.param_groups):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    copy = F.column_major if name == "basis" else torch.clone
                    self.state[p][name] = copy(value.to(p.device))


class _Matrix:
    """One projected matrix: a parameter, or one of those that a 3-D parameter stacks, with its part of the state."""

    __slots__ = ("grad", "index", "parameter", "state", "weight")

    def __init__(self, parameter: Any, state: dict[str, Any], index: int | None) -> None:
        self.parameter, self.state, self.index = parameter, state, index
        self.weight, self.grad = (x if index is None else x[index] for x in (parameter, parameter.grad))

    @property
    def begun(self) -> bool:
        """Whether it has a basis."""
        return "refresh_in" in self.state and self["refresh_in"] is not None

    def __getitem__(self, name: str) -> Any:
        return self.state[name] if self.index is None else self.state[name][self.index]

    def __setitem__(self, name: str, value: int) -> None:
        if self.index is None:
            self.state[name] = value
        else:
            self.state[name][self.index] = value


def _matrices(p: Any, state: dict[str, Any] | None) -> list[_Matrix]:
    """The matrices of a parameter. They share its state, which is the optimizer's once the first has begun."""
    state = {} if state is None else state
    return [_Matrix(p, state, index) for index in ([None] if p.ndim == 2 else range(len(p)))]


def _batches(matrices: list[_Matrix], rank: int) -> Iterator[list[_Matrix]]:
    """Matrices of one shape (as tall ones), dtype and device, at most `BATCH` low-rank elements together."""
    alike: dict[Any, list[_Matrix]] = defaultdict(list)
    for matrix in matrices:
        shape, p = matrix.weight.shape, matrix.parameter
        alike[max(shape), min(shape), p.dtype, p.grad.dtype, p.device].append(matrix)
    for (long, short, *_, device), members in alike.items():
        size = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // (long * min(rank, short)))
        for i in range(0, len(members), size):
            yield members[i : i + size]


def _next_seed(state: dict[str, Any]) -> int:
    """A seed for one draw; advances the state's (Knuth's MMIX generator), so that a resumed run draws the same."""
    state["seed"] = (state["seed"] * 6364136223846793005 + 1442695040888963407) % 2**63
    return int(state["seed"])


def _generator(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Generator | None:
    """The generator of this step's roundings, if something of the parameter is rounded at random."""
    if group["state_dtype"] != "float32" or (group["stochastic_rounding"] and p.dtype == torch.bfloat16):
        return torch.Generator(p.device).manual_seed(_next_seed(state))
    return None
