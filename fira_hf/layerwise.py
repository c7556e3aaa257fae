"""Stepping weights inside backward, as soon as their gradients are complete, and freeing the gradients."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from .distributed import add_up_gradients
from .int8 import stored
from .optimizer import FiraAdamW
from .state import first_states
from .wrappers import unwrapped

# Bytes of gradients that are held until their weights are stepped together. Where the host only starts what a device
# does, it takes as long for one matrix as for many of its shape.
HELD = {"cpu": 0}
HELD_ELSEWHERE = 2**26
END = -1  # what the processes compare at the end of a step, where in backward it is the place of a weight


@dataclass
class _Held:
    """Weights whose gradients are complete, and the bytes of these."""

    weights: list[Any] = field(default_factory=list)
    size: int = 0


class StepInBackward:
    """The hooks that `step_in_backward` has put on the weights of an optimizer."""

    def __init__(self, optimizer: FiraAdamW, when: Callable[[], bool], group: dist.ProcessGroup | None) -> None:
        self._optimizer, self._when, self._group = optimizer, when, group
        self._first: dict[Any, dict[str, Any]] | None = None
        # The norm of the gradient of each weight that has come since the last `optimizer.step()`.
        self._norms: dict[Any, Tensor] = {}
        # Backward passes that have stepped weights and have not ended: they run, or something broke them off. Of each
        # what is yet to be stepped, by what its threads do not share: device and stream.
        self._open: dict[int, dict[Any, _Held]] = {}
        # Whether `remove()` came between a backward pass and `optimizer.step()`.
        self._is_half_removed = False
        # Weight -> its group and its place among all. Not the group itself: load_state_dict makes new ones.
        owners = [(p, g) for g, owner in enumerate(optimizer.param_groups) for p in owner["params"]]
        self._weights = {p: (g, place) for place, (p, g) in enumerate(owners)}
        # Places of the weights in the order in which the first backward reached them, on every process.
        self._order: list[int] = []
        self._order_is_known = False
        if (earlier := hooks_of(optimizer)) is not None:
            earlier._refuse_half_a_step()
            raise ValueError("The weights of this optimizer are stepped in backward already: remove() comes first.")
        for p in self._weights:
            if _is_stepped(p):
                gc.collect()  # of an optimizer that was dropped
            if _is_stepped(p):
                raise ValueError(
                    "Another optimizer steps these weights in backward already: call remove() of what its "
                    "step_in_backward returned, or make the model anew."
                )
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
                for part in stored(p.detach()):
                    dist.broadcast(part, dist.get_global_rank(group, 0), group)
        # Last, so that an error leaves none behind.
        self._of_weights: list[Any] = []
        try:
            for p in self._weights:
                if p.requires_grad:  # torch takes no hook on another
                    self._of_weights.append(p.register_post_accumulate_grad_hook(_Hook(self)))
        except BaseException:
            for handle in self._of_weights:
                handle.remove()
            raise
        self._of_steps = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._refuse_half_a_step),
        ]
        self._of_loading = optimizer.register_load_state_dict_post_hook(self._after_loading)

    def remove(self) -> None:
        """Takes the hooks off. From then on `optimizer.step()` steps all weights, as without them.

        Between a backward pass and `optimizer.step()` that would leave half a step: then the optimizer refuses to step
        and to give its state until one is loaded.
        """
        for handle in self._of_weights:
            handle.remove()
        self._of_weights.clear()
        if torch._C._current_graph_task_id() == -1:  # not from within backward, which would end as ever
            for p in self._norms:
                p.grad = None
            self._is_half_removed |= bool(self._norms)
            self._open.clear()
        if not self._is_open:
            for handle in [*self._of_steps, self._of_loading]:
                handle.remove()

    @property
    def _is_open(self) -> bool:
        return self._is_half_removed or bool(self._open)

    def grad_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm (0-dim) of all gradients of this step, those that are gone included; before `optimizer.step()`."""
        norms = []
        for p in parameters:
            if p in self._norms:
                norms.append(self._norms[p])
            elif p.grad is not None:
                norms.append(torch.linalg.vector_norm(p.grad))
        if not norms:
            return torch.zeros((), dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @torch.no_grad()
    def _step(self, p: Any) -> None:
        if not self._when():
            return
        task = torch._C._current_graph_task_id()
        if not self._is_open:
            for owner in self._optimizer.param_groups:
                self._optimizer.check_step(owner, [weight for weight in owner["params"] if weight.requires_grad])
        if task not in self._open:
            # What torch calls when a backward pass ends, and does not where an error breaks it off.
            Variable._execution_engine.queue_callback(functools.partial(self._after_backward, task))
            self._open[task] = {}
        if p in self._norms:
            raise RuntimeError(
                f"A second gradient came to a weight of shape {tuple(p.shape)} that has been stepped, before "
                "optimizer.step(): with several backward passes a step say by when=... which is the last, with "
                "reentrant checkpointing of a weight that several layers share set use_reentrant=False, otherwise do "
                "without layerwise. After a backward pass that was broken off, load the last checkpoint."
            )
        group, place = self._weights[p]
        if self._group is not None:
            self._average(p, place)
        add_up_gradients([p])
        if p.grad.is_sparse:  # which gradients are to come was not known above
            self._optimizer.check_step(self._optimizer.param_groups[group], [p])
        self._norms[p] = torch.linalg.vector_norm(p.grad)
        where = (p.device, torch.cuda.current_stream(p.device) if p.is_cuda else None)
        held = self._open[task].setdefault(where, _Held())
        most, size = HELD.get(p.device.type, HELD_ELSEWHERE), p.grad.nbytes
        if held.size + size > most:
            self._step_held(held)
        held.weights.append(p)
        held.size += size
        if held.size >= most:
            self._step_held(held)

    def _step_held(self, held: _Held) -> None:
        """Those of a projected group go together. Another weight is passed over by itself if its gradient is not
        finite."""
        together: dict[Any, list[Any]] = {}
        for p in held.weights:
            if p.grad is not None:  # which a hook of someone else may have freed
                group = self._weights[p][0]
                alone = None if "rank" in self._optimizer.param_groups[group] else p
                together.setdefault((group, alone), []).append(p)
        for (group, _), weights in together.items():
            is_new = not all(self._optimizer.state.get(p) for p in weights)
            if is_new and self._first is None:
                self._first = first_states(self._optimizer.param_groups)
            owner = self._optimizer.param_groups[group]
            self._optimizer.step_some(owner, weights, self._first if is_new else None)
            for p in weights:
                p.grad = None
        held.weights, held.size = [], 0

    @torch.no_grad()
    def _after_backward(self, task: int) -> None:
        for held in self._open.get(task, {}).values():
            self._step_held(held)
        self._open.pop(task, None)

    def _refuse_half_a_step(self, *_: Any) -> None:
        if self._is_open:
            raise RuntimeError(
                f"{len(self._norms)} of {len(self._weights)} weights were stepped, or about to be, in a backward pass "
                "that was broken off, or that no optimizer.step() followed. Load weights and optimizer from the last "
                "checkpoint (in the Trainer: resume_from_checkpoint=...), or begin with a new model and a new "
                "optimizer."
            )

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_half_a_step()
        if self._group is not None:
            if any(x is not None for x in (*args[1:], *kwargs.values())):
                raise RuntimeError(
                    "The processes end a step together in optimizer.step(), after backward: call it without a closure."
                )
            self._check_order(END)
            left = [p for owner in self._optimizer.param_groups for p in owner["params"] if p.grad is not None]
            if left:
                raise RuntimeError(
                    f"{len(left)} weights have gradients of this process alone, since the last backward pass of the "
                    'step did not reach them: use optim="fira" under DDP for this model.'
                )

    def _after_step(self, *_: Any) -> None:
        self._refuse_half_a_step()  # of a closure that went on after an error
        self._norms.clear()
        self._first = None

    def _after_loading(self, *_: Any) -> None:
        """With the weights, which come from the same checkpoint, the step that was broken off is gone."""
        for p in self._norms:  # of a backward pass that was broken off
            p.grad = None
        self._norms.clear()
        self._open.clear()
        self._is_half_removed = False
        self._first = None
        if not self._order_is_known:
            self._order.clear()
        if not self._of_weights:
            for handle in self._of_steps:
                handle.remove()

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


class _Hook:
    """What autograd calls. Python's garbage collector does not see the hooks of a weight: one that held the optimizer,
    which holds the weight, would keep weights and state in memory for good."""

    def __init__(self, owner: StepInBackward) -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, p: Any) -> None:
        if (owner := self.owner()) is not None:
            owner._step(p)


def _is_stepped(p: Any) -> bool:
    return any(map(_owner, (p._post_accumulate_grad_hooks or {}).values()))


def _owner(hook: Any) -> StepInBackward | None:
    owner = hook.owner() if isinstance(hook, _Hook) else getattr(hook, "__self__", None)
    return owner if isinstance(owner, StepInBackward) else None


def hooks_of(optimizer: FiraAdamW) -> StepInBackward | None:
    """What steps the weights of this optimizer in backward, if anything does."""
    return next(filter(None, map(_owner, optimizer._optimizer_step_pre_hooks.values())), None)


def step_in_backward(
    optimizer: Any, when: Callable[[], bool] = lambda: True, group: dist.ProcessGroup | None = None
) -> StepInBackward:
    """Makes `backward()` step each weight of the optimizer when its gradient is complete, and free the gradient.

    On a GPU up to 64 MiB of gradients are held, so that the host starts the steps of several weights together.

    The training loop stays as it is. `optimizer.step()` ends the step; it steps only weights that the hooks did not
    reach, as one whose last gradient came from an earlier micro-batch. The learning rate of a step is that at its
    backward: schedulers step after `optimizer.step()`, as usual.

    What needs all gradients at once cannot work: clipping by their global norm, and `GradScaler`, whose step raises.
    A weight whose gradient is not finite is passed over by itself, also in a group without `rank`, which
    `FiraAdamW.step` would pass over as a whole. A weight that is frozen now, or added later, is left to
    `optimizer.step()`, which with a group is an error.

    An error inside backward leaves some weights a step ahead of the others. From then on the optimizer refuses to step
    and to give its state until one is loaded: load the weights from the same checkpoint. (With reentrant checkpointing
    and no layer outside of it, an error between two of its segments is noticed only by the next backward.)

    Args:
        optimizer: as it is, or as accelerate's `prepare` or Lightning wrapped it. Its state and its settings are those
            of ordinary steps, as are its checkpoints.
        when: asked for each gradient, says whether this backward pass is the last of its step. Where several
            micro-batches are accumulated, `lambda: accelerator.sync_gradients`; the gradients of all weights are held
            from the first micro-batch to the last.
        group: the processes of which the gradients are averaged, weight by weight, in place of
            `DistributedDataParallel`, whose buckets hold all gradients: the model must not be wrapped in it. Weights
            are made equal to those of the group's first process; buffers are left alone.

    Returns:
        What takes the hooks off again (`remove()`) and knows the norm of the gradients (`grad_norm(parameters)`).

    Raises:
        ValueError: it is another optimizer, its weights are stepped in backward already (by it or another one), a
            weight is sharded, or there are several processes and no group.
        RuntimeError, in backward or `optimizer.step()`: a weight gets a gradient after it was stepped, a backward pass
            was broken off, or the processes of the group do not reach the same weights in the same order.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, FiraAdamW):
        raise ValueError(f"step_in_backward steps FiraAdamW, but it was given {type(inner).__name__}.")
    return StepInBackward(inner, when, group)
