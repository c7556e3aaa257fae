"""Bytes of training by component. Nothing is allocated: a model on the meta device will do, of any size."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import FiraConfig
from .targets import adamw_state_bytes, find_targets


@dataclass
class MemoryEstimate:
    """Bytes on one device. `activations`: what the peak of forward and backward adds to gradients; 0 if not asked."""

    weights: int
    gradients: int
    optimizer_state: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.activations


def estimate_memory(
    model: nn.Module, config: FiraConfig | None, batch_size: int | None = None, sequence_length: int | None = None
) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer state: Fira by the config, or torch's AdamW where it is None.

    With a batch size and a sequence length (tokens), the peak of a training step of this language model, too, in
    the dtype of its weights, and with gradient checkpointing if that is switched on.

    Raises:
        ValueError: only one of batch size and sequence length is given, or the config does not fit the model.
    """
    if (batch_size is None) != (sequence_length is None):
        raise ValueError(
            f"batch_size={batch_size}, sequence_length={sequence_length}: activations need both; leave out both for "
            "an estimate without them."
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config is None:
        state = sum(map(adamw_state_bytes, trainable))
    else:
        state = find_targets(model, config).state_bytes
    gradients = _bytes(trainable)
    estimate = MemoryEstimate(weights=_bytes(model.parameters()), gradients=gradients, optimizer_state=state)
    if batch_size is not None and sequence_length is not None:
        estimate.activations = max(0, _peak_of_step(model, batch_size, sequence_length) - gradients)
    return estimate


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live; those of `known` count as nothing."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._add(tensor, 0)

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        return out


def _peak_of_step(model: nn.Module, batch_size: int, sequence_length: int) -> int:
    """Peak bytes of forward and backward beyond the weights, gradients included: a run on tensors without data."""
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    training = model.training
    model.train()
    try:
        with FakeTensorMode():
            # On one device, and tied where they were tied.
            stand_ins = {tensor: _like(tensor) for _, _, tensor in slots}
            for table, name, tensor in slots:
                table[name] = stand_ins[tensor]
            tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long)
            with _LiveBytes([*stand_ins.values(), tokens]) as live:
                model(input_ids=tokens, labels=tokens).loss.backward()
    finally:
        for table, name, tensor in slots:
            table[name] = tensor
        model.train(training)
    return live.peak


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
