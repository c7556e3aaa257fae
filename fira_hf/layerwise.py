"""Stepping each weight inside backward, as soon as its gradient is complete, and freeing the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .optimizer import FiraAdamW
from .state import first_states

END = -1  # what the processes compare at the end of a step, where in backward it is the place of a weight


class StepInBackward:
    """The hooks that `step_in_backward` has put on the weights of an optimizer."""

    def __init__(self, optimizer: FiraAdamW, when: Callable[[], bool], group: dist.ProcessGroup | None) -> None:
        self._optimizer, self._when, self._group = optimizer, when, group
        self._first: dict[Any, dict[str, Any]] | None = None
        # The norm of the gradient of each weight that has been stepped since the last `optimizer.step()`.
        self._norms: dict[Any, Tensor] = {}
        # Weight -> its group and its place among all. Not the group itself: load_state_dict makes new ones.
        owners = [(p, g) for g, owner in enumerate(optimizer.param_groups) for p in owner["params"]]
        self._weights = {p: (g, place) for place, (p, g) in enumerate(owners)}
        # Places of the weights in the order in which the first backward reached them, on every process.
        self._order: list[int] = []
        self._order_is_known = False
        for p in self._weights:
            if hasattr(p, "device_mesh"):
                raise ValueError(
                    "Weights cannot be stepped inside backward where they are sharded (FSDP, tensor parallel), since "
                    "their gradients do not pass through the hooks: leave layerwise out."
                )
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"{dist.get_world_size()} processes, but group=None: the hooks step before DistributedDataParallel "
                "averages the gradients. Leave the model unwrapped and pass group=torch.distributed.group.WORLD."
            )
        if group is not None:
            for p in self._weights:  # as DDP does
                dist.broadcast(p.detach(), dist.get_global_rank(group, 0), group)
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(self._step) for p in self._weights]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Takes the hooks off. From then on `optimizer.step()` steps all weights, as without them."""
        for handle in self._handles:
            handle.remove()

    def grad_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm (0-dim) of all gradients of this step, those that are gone included; before `optimizer.step()`."""
        norms = []
        for p in parameters:
            if p in self._norms:
                norms.append(self._norms[p])
            elif p.grad is not None:
                norms.append(torch.linalg.vector_norm(p.grad))
        if not norms:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @torch.no_grad()
    def _step(self, p: Any) -> None:
        if not self._when():
            return
        if p in self._norms:
            raise RuntimeError(
                f"A second gradient came to a weight of shape {tuple(p.shape)} that has been stepped, before "
                "optimizer.step(): with several backward passes a step say by when=... which is the last, with "
                "reentrant checkpointing of a weight that several layers share set use_reentrant=False, otherwise do "
                "without layerwise."
            )
        group, place = self._weights[p]
        if self._group is not None:
            self._average(p, place)
        is_new = not self._optimizer.state.get(p)
        if is_new and self._first is None:
            self._first = first_states(self._optimizer.param_groups)
        owner = self._optimizer.param_groups[group]
        self._optimizer._step_parameters(owner, [p], self._first if is_new else None)
        self._norms[p] = torch.linalg.vector_norm(p.grad)
        p.grad = None

    def _before_step(self, *_: Any) -> None:
        if self._group is not None:
            self._check_order(END)
            left = [p for p in self._weights if p.grad is not None]
            if left:
                raise RuntimeError(
                    f"{len(left)} weights have gradients of this process alone, since the last backward pass of the "
                    'step did not reach them: use optim="fira" under DDP for this model.'
                )

    def _after_step(self, *_: Any) -> None:
        self._norms.clear()
        self._first = None

    def _average(self, p: Any, place: int) -> None:
        self._check_order(place)
        p.grad.div_(dist.get_world_size(self._group))
        dist.all_reduce(p.grad, group=self._group)

    def _check_order(self, place: int) -> None:
        """Raises unless all processes are at this place, so that no gradient is added to that of another weight.

        In the first step the processes compare; in the later ones each compares with its first.
        """
        if self._order_is_known:
            same = self._order[len(self._norms)] == place
        else:
            self._order.append(place)
            extremes = torch.tensor([place, -place], device=next(iter(self._weights)).device)
            dist.all_reduce(extremes, dist.ReduceOp.MAX, self._group)
            same = extremes.tolist() == [place, -place]
            self._order_is_known = place == END
        if not same:
            raise RuntimeError(
                "The gradients of the processes do not come in one fixed order, which stepping inside backward needs "
                'with several processes: use optim="fira" under DDP for this model.'
            )


def step_in_backward(
    optimizer: FiraAdamW, when: Callable[[], bool] = lambda: True, group: dist.ProcessGroup | None = None
) -> StepInBackward:
    """Makes `backward()` step each weight of the optimizer when its gradient is complete, and free the gradient.

    The training loop stays as it is. `optimizer.step()` ends the step; it steps only weights that the hooks did not
    reach, as one whose last gradient came from an earlier micro-batch. The learning rate of a step is that at its
    backward: schedulers step after `optimizer.step()`, as usual.

    What needs all gradients at once cannot work: clipping by their global norm, and `GradScaler`, whose step raises.
    A weight whose gradient is not finite is passed over by itself, also in a group without `rank`, which
    `FiraAdamW.step` would pass over as a whole.

    Args:
        optimizer: its state and its settings are those of ordinary steps, as are its checkpoints.
        when: asked for each gradient, says whether this backward pass is the last of its step. Where several
            micro-batches are accumulated, `lambda: accelerator.sync_gradients`; the gradients of all weights are held
            from the first micro-batch to the last.
        group: the processes of which the gradients are averaged, weight by weight, in place of
            `DistributedDataParallel`, whose buckets hold all gradients: the model must not be wrapped in it. Weights
            are made equal to those of the group's first process; buffers are left alone.

    Returns:
        What takes the hooks off again (`remove()`) and knows the norm of the gradients (`grad_norm(parameters)`).

    Raises:
        ValueError: a weight is sharded, or there are several processes and no group.
        RuntimeError, in backward or `optimizer.step()`: a weight gets a gradient after it was stepped, or the
            processes of the group do not reach the same weights in the same order.
    """
    return StepInBackward(optimizer, when, group)
