"""`FiraAdamW`: validates parameter groups, holds the state, loops. The mathematics is in `functional`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from . import functional as F
from .checkpoint import IMPLEMENTATION, check_checkpoint, config_in_effect, pairs
from .config import FiraConfig
from .dense import create_dense, step_dense
from .distributed import add_up_gradients, agree, local, shards_of
from .groups import (
    check_group,
    check_rates,
    check_settings,
    check_weight,
    dimensions_of,
    name_of,
    name_parameters,
    watched,
)
from .matrices import Matrix, batches, by_device, matrices_of, products_on
from .projected import step_projected
from .refresh import refresh
from .state import create_state, first_states, loaded_state, misfit, of_layout, state_misfit

logger = logging.getLogger(__name__)

STATISTICS = ("limiter_active", "captured_energy", "residual_share")


class FiraAdamW(torch.optim.Optimizer):
    """AdamW in which the weights of some groups are trained by Fira (arXiv 2410.01623): moments in a low-rank subspace
    of the gradient, and the rest of the gradient, scaled and limited in growth, applied beside them.

    A group with the key `rank` is projected; its parameters are matrices, or stacks of matrices (3-D, such as the
    experts of a layer) of which each is projected by itself. It may set `split`, the number of equal parts of each
    matrix that are projected by themselves, and `transposed`, whether matrices are stored (in, out) as in GPT-2's
    `Conv1D`, not (out, in) as in `nn.Linear`: parts lie along `out`, and a basis of a square matrix spans `in`.
    With `convolution` its parameters are weights of convolutions (out, in, *kernel), each the matrix
    (out, in * kernel): a view, contiguous or channels_last. Parts, such as groups, lie along `out`.
    It may set `alpha`, `update_proj_gap`, `gamma`, `limiter`, `projection`, `refresh`, `moments`, `base_optimizer`,
    `scaling`, `residual` and `adjust_lr`, which mean and default to what they do in `FiraConfig`. A group without
    `rank` is AdamW by torch's formulas. Every group may set `state_dtype`, `stochastic_rounding` and `correct_bias`.
    With the settings of `fira_hf.PUBLISHED` and fp32 weights, projected groups follow `fira==1.0.2` step for step.

    State, created at a weight's first gradient that is finite and not zero (long >= short: sides of the matrix;
    r = min(rank, short); moments and basis of `state_dtype`, whatever the weight's dtype, the scalars fp32; all kept
    so by `load_state_dict`):

        step           0-dim           updates made (fp32, on the weight's device); of the present block of columns
        phase          int             the basis is due at updates `phase`, `phase` + `update_proj_gap`, ...; on an
                                       accelerator, whose updates the host does not know, at calls
        seed           int             of what is drawn at random
        calls          int             of `step()` with a gradient, usable or not, since the first one
        basis          short x r       orthonormal columns; none for columns, or for a whole moment at full rank
        exp_avg        long x r        first moment of G Q; with residual="moment" of G, as large as the weight
        exp_avg_sq     long x r        second moment of G Q (base_optimizer="adamw")
        exp_avg_sq_row long x 1        of its means over rows ("adafactor")
        exp_avg_sq_col 1 x r           of its sums over columns ("adafactor")
        *_scale        rows x r / 32   state_dtype="int8": basis, exp_avg and exp_avg_sq are codes, see `codes`; of a
                                       whole moment rows x columns / 32, see `whole`
        residual_norm  0-dim           norm of the last residual, as limited; infinite: none, or a negligible one

    The state of a stack, or of a matrix in parts, has one more dimension in front (the parts of a matrix one after
    another). `phase` is that of the first of them; where refreshes are staggered, those of the others are spread
    evenly over the interval. That of a convolution has `channels_last`, bool: its columns are ordered (*kernel, in),
    as the weight lies, and not (in, *kernel). Where the weight comes to lie otherwise, the state follows.

    A weight of a group without `rank` has `step`, `seed`, `calls`, and `exp_avg` and `exp_avg_sq` of its own shape.

    A gradient that is zero or not finite changes nothing of a projected weight and its state (but the moments of a
    block of columns whose turn ends are dropped all the same). A group without `rank`
    is passed over for a step in which one of its gradients is not finite. For both, one counts as not finite, too,
    when the square of its norm is not in fp32 (a norm beyond 1.8e19), as the second moment would not be.
    An accelerator is not synchronised with the host but for first bases (and `projection="svd"`).

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. A projected weight decays after its update. What betas
            and eps mean there with another base optimizer: see `FiraConfig`. Here and in groups a tensor is read once
            and its number kept: filling it later changes nothing, assigning to the group does, as schedules do.

    Raises:
        ValueError: a setting is unknown or not valid, a parameter is not of fp32, bf16 or fp16, or one of a projected
            group is no matrix, no stack of matrices and, with `convolution`, no weight of one.
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
        # The settings of groups, by identity, as they were when they were last checked.
        self._checked: dict[int, dict[str, Any]] = {}
        # What `_seen` said of weights that have passed `check_step`, by identity.
        self._passed: dict[int, Any] = {}
        # Replicas that hold the same weights and get the same gradients, as under DDP: each basis is found by one of
        # them and broadcast. None: every process finds all bases.
        self.process_group: ProcessGroup | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if not any("rank" in group for group in self.param_groups):
            logger.warning(
                "FiraAdamW projects nothing and is plain AdamW, since no parameter group has a 'rank': make it by "
                "get_fira_optimizer(model, FiraConfig(...)), or by what Trainer.get_optimizer_cls_and_kwargs(args, "
                'model) gives for optim="fira", or give groups of matrices a rank.'
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("config", "summary", "track_statistics", "_sums")}
        # Processes are not part of what is copied or pickled.
        return {**super().__getstate__(), **own, "_checked": {}, "_passed": {}, "process_group": None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if any("param_names" in group for group in self.param_groups):
            # torch wants names in all groups or in none. The factory gives them, whoever adds a group need not know.
            name_parameters(param_group, first=sum(len(group["params"]) for group in self.param_groups))
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step and returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, parameters in work:
            add_up_gradients(parameters)
            self.check_step(group, parameters)
        is_rehearsal = self._is_rehearsal()
        first = None
        calls = {p: self.state[p]["calls"] for _, parameters in work for p in parameters if self.state.get(p)}
        if len(calls) < sum(len(parameters) for _, parameters in work):
            first = first_states(self.param_groups)
        # Most memory is asked for here, as states and bases are made, and no weight has been written by then. Where it
        # runs out later, some weights have made this step and others not, as with torch's own optimizers.
        try:
            matrices = [self._prepare(group, parameters, first, is_rehearsal) for group, parameters in work]
        except BaseException:
            self._take_back(work, calls)
            raise
        if not is_rehearsal:
            for (group, parameters), own in zip(work, matrices, strict=True):
                self._write(group, parameters, own)
        return loss

    def _take_back(self, work: list[tuple[dict[str, Any], list[Any]]], calls: dict[Any, int]) -> None:
        """After an error before any weight was written: the next step is this one again. (On an accelerator a basis
        that was found may be refined once more.)"""
        for _, parameters in work:
            for p in parameters:
                if p in calls:
                    self.state[p]["calls"] = calls[p]
                else:
                    self.state.pop(p, None)

    def check_step(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """Whether these parameters of a group can be stepped with the gradients they have. Reads and writes no data.

        torch's kernels do not look at shapes: what does not fit would be written past its end.

        Raises:
            RuntimeError: a gradient is sparse, or of another shape, dtype or device than its weight, or the state is,
                or the weight is sharded in a way that cannot be projected.
            ValueError: the group cannot train the weight, whose dtype or shape has changed, or a setting that was
                assigned to the group is unknown or not valid.
        """
        # What has been assigned since is checked, and kept, as in the constructor.
        check_rates(group)
        try:
            is_checked = self._checked.get(id(group)) == watched(group)
        except (RuntimeError, ValueError):  # an array, which has no one truth value
            is_checked = False
        if not is_checked:
            check_settings(group)
            self._checked[id(group)] = watched(group)
            self._passed = {}
        for p in parameters:
            state = self.state.get(p, {})
            seen = _seen(p, state, group)
            if seen is not None and self._passed.get(id(p)) == seen:
                continue
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("FiraAdamW does not take sparse gradients: use sparse=False in the embedding.")
            if "rank" in group and p.ndim not in dimensions_of(group):
                raise RuntimeError(
                    "FiraAdamW cannot project flattened weights (FSDP1, DeepSpeed): use DDP or fully_shard."
                )
            check_weight(p, group)
            problem = misfit(p) or state_misfit(p, state, group)
            if problem is not None:
                raise RuntimeError(
                    f"{name_of(p, group)} of shape {tuple(p.shape)} {problem}. Nothing was changed in this step. "
                    "Change weights before the optimizer is made, or make a new one, and clear the gradients."
                )
            # Asked in any case: it raises where the weight is sharded in a way that cannot be projected.
            if "rank" in group and shards_of(p, *of_layout(group)) and group["projection"] == "svd":
                raise RuntimeError(
                    'projection="svd" needs whole gradients, and FSDP shards them: set projection="power".'
                )
            self._passed[id(p)] = seen

    def step_some(self, group: dict[str, Any], parameters: list[Any], first: dict[Any, dict[str, Any]] | None) -> None:
        """The step of parameters of a group that `check_step` has passed; `first` where one has no state yet."""
        self._write(group, parameters, self._prepare(group, parameters, first))

    @F.fp32_products()
    def _prepare(
        self,
        group: dict[str, Any],
        parameters: list[Any],
        first: dict[Any, dict[str, Any]] | None,
        is_rehearsal: bool = False,
    ) -> list[Matrix]:
        """Creates the states that are not there yet, finds the bases that are due, and returns the matrices that have
        begun. No weight is written."""
        if not parameters:
            return []
        existing = [p for p in parameters if self.state.get(p)]
        if first is not None:
            self._create_states(group, first, everywhere=is_rehearsal)
        if is_rehearsal:
            return []
        for p in existing:
            state: Any = self.state[p]
            # That of a sharded weight is there before it has begun. Of a sharded stack each process has matrices of
            # its own, which begin when they like, and a checkpoint has one count for all.
            is_shared = isinstance(p, DTensor) and p.ndim == 3 and not group.get("convolution")
            if "rank" not in group or is_shared or state.begun:
                state["calls"] += 1
            if "rank" in group:
                state.follow_interval(group)
        if "rank" not in group:
            for p in parameters:
                if not self.state.get(p):
                    self.state[p] = create_dense(p, group, (first or {})[p])
            return []
        begun = []
        for of_device in by_device(parameters):
            with products_on(of_device[0]):
                matrices = [matrix for p in of_device for matrix in matrices_of(p, self.state, group)]
                refresh(matrices, group, first or {}, self.process_group)
            begun += [matrix for matrix in matrices if matrix.begun]
        if first is not None:
            self.state.update((matrix.parameter, matrix.state) for matrix in begun)
        return begun

    @F.fp32_products()
    def _write(self, group: dict[str, Any], parameters: list[Any], matrices: list[Matrix]) -> None:
        """The step of the parameters of a group, of which `matrices` have begun."""
        if "rank" not in group and parameters:
            step_dense(parameters, [self.state[p] for p in parameters], group)
        for batch in batches(matrices, group.get("rank", 0)):
            with products_on(batch[0].parameter):
                step_projected(batch, group, self._add_statistics if self.track_statistics else None)

    def _is_rehearsal(self) -> bool:
        """Whether this is the step, with zero gradients at a learning rate of 0, by which torch.distributed.checkpoint
        has an optimizer create its state before it loads one."""
        if self.state or any(group["lr"] for group in self.param_groups):
            return False
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        are_zero = not any(local(p.grad).any() for p in parameters)
        # A process may hold nothing but zeros of gradients that are not zero.
        if not any(isinstance(p, DTensor) for p in parameters):
            return are_zero
        return bool(agree(torch.tensor(are_zero, device=local(parameters[0].grad).device), parameters))

    def _create_states(self, group: dict[str, Any], first: dict[Any, dict[str, Any]], everywhere: bool) -> None:
        """Creates the states of a group's weights, whatever their gradients: of those that are sharded, or everywhere.

        A distributed checkpoint is loaded into states that are there, so they must be the same in every run.
        """
        for p in group["params"]:
            if self.state.get(p) or not p.requires_grad or not (everywhere or isinstance(p, DTensor)):
                continue
            if "rank" in group:
                self.state[p] = create_state(p, group, first[p])
            else:
                self.state[p] = create_dense(p, group, first[p])

    def _add_statistics(
        self, G_norm: Tensor, R_norm: Tensor, low_norm: Tensor, residual: Tensor, c: Tensor, active: Tensor | None
    ) -> None:
        energy = R_norm.square() / G_norm.square()
        # An infinite residual norm stands for a negligible one.
        residual_sq = torch.where(torch.isfinite(residual), residual, 0.0).square()
        share = residual_sq / (residual_sq + low_norm.square())
        columns = torch.cat([torch.ones_like(c), (c < 1).float(), energy, share], dim=1).flatten(1)
        row = (columns if active is None else torch.where(active[:, None], columns, 0.0)).sum(0)
        total = self._sums.get(row.device)
        self._sums[row.device] = row if total is None else total.add_(row)

    def pop_statistics(self) -> dict[str, float]:
        """Means over the projected matrices and the steps since the last call; empty if there were none.

        limiter_active: share of the residuals that the norm-growth limiter scaled down. captured_energy:
        ||R||^2 / ||G||^2, the share of the gradient's energy that lies in the subspace. residual_share:
        ||S||^2 / (||alpha N||^2 + ||S||^2), the residual's part of the update. Of a sharded stack the matrices of this
        process count. Reads the device; set `track_statistics` before the steps of interest.
        """
        sums = sum(total.cpu().double() for total in self._sums.values())
        self._sums.clear()
        if not torch.is_tensor(sums) or sums[0] == 0:
            return {}
        return dict(zip(STATISTICS, (sums[1:] / sums[0]).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it, with copies of the bases. To go back to it later in this process,
        keep a `copy.deepcopy` of it, as with any of them: the moments in it are those that the next steps change."""
        # Hooks that others have registered come after this one, and see what is saved.
        hook = self.register_state_dict_post_hook(_as_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as saved, in the dtypes of `state_dtype` (torch would cast it to that of the weight).

        As everywhere in torch, lr, betas, eps and weight_decay come from the checkpoint. Hooks that others have
        registered may change it before, or the state after, as with torch's own optimizers.

        Raises:
            ValueError: the checkpoint projects other weights than this optimizer, or with other settings, or a state
                in it is not complete or not that of its weight.
        """
        loaded: dict[str, Any] = {}
        own = [dict(group) for group in self.param_groups]

        def check(_: Any, final: dict[str, Any]) -> None:
            check_checkpoint(final, self.param_groups)
            loaded.update(final)

        def restore(_: Any) -> None:
            self._checked, self._passed = {}, {}  # torch has put other groups in the place of those
            for group, before in zip(self.param_groups, own, strict=True):
                for name in IMPLEMENTATION:
                    group.pop(name, None)  # how AdamW makes its step means nothing here
                for name, value in before.items():
                    group.setdefault(name, value)  # AdamW does not save all of them
                group["betas"] = tuple(group["betas"])
            first = first_states(self.param_groups)
            groups = [group for group in self.param_groups for _ in group["params"]]
            for (index, p), group in zip(pairs(loaded, self.param_groups), groups, strict=True):
                if saved := loaded["state"].get(index):
                    self.state[p] = loaded_state(p, {**first[p], **saved}, group)
            if self.config is not None:
                self.config = config_in_effect(self.config, own, self.param_groups)

        # The last hook before and the first one after, around what torch does.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _as_saved(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    def saved(state: Any) -> Any:
        if not isinstance(state, dict):
            return state  # what others keep there, as torch allows
        # torch.distributed sends a tensor as it lies in memory, and a basis lies there column by column.
        return {name: value.contiguous() if name == "basis" else value for name, value in state.items()}

    return {**state_dict, "state": {index: saved(state) for index, state in state_dict["state"].items()}}


def _seen(p: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
    """All that `check_step` looks at, beside the group's settings: while it is the same there is nothing to check,
    which takes as long as all else that the host does for a weight. None where that is not known, as of DTensors."""
    grad = p.grad
    if grad is None or type(p) is not torch.nn.Parameter or type(grad) is not Tensor:
        return None
    kept = [(id(x), x.dtype, x.device, x.shape) for x in state.values() if isinstance(x, Tensor)]
    of_grad = (grad.dtype, grad.device, grad.shape, grad.layout)
    return id(group), p.dtype, p.device, p.shape, p.stride(), of_grad, type(state), kept
