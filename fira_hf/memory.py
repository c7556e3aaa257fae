"""Bytes of training by component. Nothing is allocated: a model on the meta device will do, of any size."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import int8
from .config import ALL_LINEAR, ALL_LINEAR_AND_CONV, LAYERWISE, FiraConfig, unknown_name
from .meta_models import INT8, add_lora, build_on_meta, switch_on_checkpointing
from .targets import FP32, adamw_state_bytes, find_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass
class MemoryEstimate:
    """Bytes on one device. `activations`: what the peak of forward and backward adds to gradients; 0 if not asked.

    `gradients` of layerwise steps are the largest that are held at once.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.activations


def estimate_memory(
    model: nn.Module,
    config: FiraConfig | None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    optimizer: str | None = None,
    accumulates: bool = False,
) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer state, and of activations where a batch is given.

    With a batch size and a sequence length (tokens), the peak of a training step of this language model, too, in
    the dtype of its weights, and with gradient checkpointing if that is switched on.

    Args:
        config: what is projected, at which rank; of `state_dtype`, `base_optimizer`, `projection` and `residual` only
            Fira makes use.
        optimizer: "adamw" (torch's), "fira", "fira_layerwise", "galore" (galore_torch), "apollo" (apollo_torch) or
            "flora" (flora_opt, with momentum); by default Fira, or AdamW where there is no config.
        accumulates: gradients of earlier micro-batches are there during forward and backward.

    Raises:
        ValueError: only one of batch size and sequence length is given, or one is below 1, the config does not fit
            the model, there is no such optimizer, it cannot project convolutions, or activations cannot be predicted:
            they depend on the data, or the model takes no tokens.
    """
    _check_batch(batch_size, sequence_length)
    optimizer = optimizer or ("adamw" if config is None else "fira")
    layerwise = optimizer == LAYERWISE
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Backward holds a gradient of a tied weight until it has the other.
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    largest = max((uses[p] * _bytes([p]) for p in trainable), default=0)
    estimate = MemoryEstimate(
        weights=int8.nbytes(model.parameters()) + sum(_bytes(_scales(p)) for p in model.parameters()),
        gradients=largest if layerwise and not accumulates else _bytes(trainable),
        optimizer_state=_state_bytes(model, config, optimizer),
    )
    if batch_size is not None and sequence_length is not None:
        peak = _peak_of_step(model, batch_size, sequence_length, layerwise, accumulates)
        estimate.activations = max(0, peak - estimate.gradients)
    return estimate


def _check_batch(batch_size: int | None, sequence_length: int | None) -> None:
    if (batch_size is None) != (sequence_length is None):
        raise ValueError(
            f"batch_size={batch_size}, sequence_length={sequence_length}: activations need both; leave out both for "
            "an estimate without them."
        )
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not valid: {name} must be at least 1.")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _scales(p: Any) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a quantised weight: a scale for each block, quantised itself, and tables."""
    of = getattr(p, "quant_state", None)
    while of is not None:
        yield from (value for value in vars(of).values() if isinstance(value, Tensor))
        of = of.state2


def _state_bytes(model: nn.Module, config: FiraConfig | None, optimizer: str) -> int:
    if optimizer == "adamw":
        return sum(adamw_state_bytes(p) for p in model.parameters() if p.requires_grad)
    if config is None:
        raise ValueError(f"optimizer={optimizer!r} projects gradients: it needs a config that says which.")
    plan = find_targets(model, config)
    if optimizer in ("fira", LAYERWISE):
        return plan.state_bytes
    if optimizer not in PEERS:
        raise ValueError(unknown_name("optimizer", optimizer, ["adamw", "fira", LAYERWISE, *PEERS]))
    of = PEERS[optimizer]
    if convolutions := [target.name for target in plan.projected if target.convolution]:
        raise ValueError(
            f"optimizer={optimizer!r} projects matrices and no convolutions such as {convolutions[0]}: choose others "
            "in target_modules."
        )
    return sum(of(t.parameter, t.rank) for t in plan.projected) + sum(of(s.parameter, None) for s in plan.skipped)


def _galore_bytes(p: Tensor, rank: int | None) -> int:
    """galore_torch 1.0: basis and two moments in the weight's dtype; the step is no tensor.

    In fp32 the basis is a view of all singular vectors of the short side, which therefore stay.
    """
    if rank is None:
        return 2 * _bytes([p])
    short, long = sorted(p.shape[-2:])
    basis = short * (short if p.element_size() == FP32 else rank)
    return p.element_size() * (basis + 2 * long * rank)


def _apollo_bytes(p: Tensor, rank: int | None) -> int:
    """apollo_torch 1.0.3: random projection, two moments and the last norm in the weight's dtype."""
    if rank is None:
        return 2 * _bytes([p])
    short, long = sorted(p.shape[-2:])
    return p.element_size() * (short * rank + 2 * long * rank + 1)


def _flora_bytes(p: Tensor, rank: int | None) -> int:
    """flora_opt 0.0.3 with beta1: a compressed momentum in fp32, Adafactor's rows and columns, the rms of the weight.

    It compresses no matrix that is more than four times as long as it is wide; the projection is a seed.
    """
    if p.ndim != 2:
        return FP32 * (2 * p.numel() + 1)
    short, long = sorted(p.shape)
    compressed = rank is not None and long <= 4 * short
    return FP32 * ((long * rank if compressed and rank else p.numel()) + long + short + 1)


# Bytes of the state of one weight, projected to a rank or (None) not.
PEERS: dict[str, Callable[[Tensor, int | None], int]] = {
    "galore": _galore_bytes,
    "apollo": _apollo_bytes,
    "flora": _flora_bytes,
}


@dataclass(frozen=True)
class Method:
    """A way to train: whose state, and what LoRA leaves to train.

    lora: None, no LoRA; "adapters": A and B alone, in fp32, as PEFT keeps them; "4-bit": the same on a base in 4
    bits; "all": whatever LoRA does not wrap (embeddings, norms, head) as well, and A and B in the dtype of the
    weights, as in pre-training.
    """

    optimizer: str
    lora: str | None = None


METHODS = {
    "adamw": Method("adamw"),
    "fira": Method("fira"),
    LAYERWISE: Method(LAYERWISE),
    "galore": Method("galore"),
    "apollo": Method("apollo"),
    "flora": Method("flora"),
    "lora": Method("adamw", "adapters"),
    "relora": Method("adamw", "all"),
    "fira-on-lora": Method("fira", "adapters"),
    "qlora": Method("adamw", "4-bit"),
    "fira-on-qlora": Method("fira", "4-bit"),
}
TRAIN_INT8 = ("adamw", "fira", LAYERWISE)  # methods


def predict_memory(
    model_config: PretrainedConfig,
    methods: Iterable[str],
    config: FiraConfig,
    *,
    lora_rank: int | None = None,
    dtype: str = "bfloat16",
    batch_size: int | None = None,
    sequence_length: int | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    left_out: dict[str, str] | None = None,
) -> dict[str, MemoryEstimate]:
    """Method, of `METHODS` -> `estimate_memory` of a causal language model of this configuration.

    Args:
        config: as in `estimate_memory`. LoRA wraps its targets, and Fira on LoRA projects all of LoRA's matrices.
        lora_rank: of A and B; by default the rank of `config`.
        dtype: of the weights; where the base is in 4 bits, of its products, and all else is in fp32; "int8": linear
            layers by torchao's quantised training, the rest bfloat16.
        batch_size: of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step. From 2 on every method, "fira_layerwise" too, holds the
            gradients of all weights during forward and backward.
        left_out: takes the reason why a method cannot be predicted, in place of an error.

    Raises:
        ValueError: as `estimate_memory`; there is no such method, the model is no causal language model, or
            `lora_rank` or `gradient_accumulation_steps` is below 1.
        ImportError: dtype is "int8", and torchao is not installed.
    """
    _check_batch(batch_size, sequence_length)
    on_lora = replace(config, target_modules=ALL_LINEAR)
    lora_rank = config.rank if lora_rank is None else lora_rank
    counts = {"lora_rank": lora_rank, "gradient_accumulation_steps": gradient_accumulation_steps}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not valid: {name} must be at least 1.")
    accumulates = gradient_accumulation_steps > 1
    models: dict[str | None, nn.Module] = {}
    peaks: dict[tuple[str | None, bool], int] = {}

    def build(name: str, lora: str | None) -> nn.Module:
        model = build_on_meta(model_config, dtype)
        plan = find_targets(model, config)  # every entry must match; PEFT ignores one that does not
        widest = max(max(target.parameter.shape) for target in plan.projected)
        if lora is not None and lora_rank > widest:
            raise ValueError(
                f"lora_rank={lora_rank} is above the sides of all matrices, to which {name} adds A and B: set "
                "lora_rank, or leave such methods out."
            )
        trained = model if lora is None else add_lora(model, lora_rank, config.target_modules, lora)
        if gradient_checkpointing:
            switch_on_checkpointing(trained)
        return trained

    def predict(name: str) -> MemoryEstimate:
        if name not in METHODS:
            raise ValueError(unknown_name("method", name, list(METHODS)))
        optimizer, lora = METHODS[name].optimizer, METHODS[name].lora
        if dtype == INT8 and name not in TRAIN_INT8:
            raise ValueError(
                f"{name} trains no weights of dtype={dtype!r}: choose of {', '.join(TRAIN_INT8)}, or another dtype."
            )
        if dtype == INT8 and config.residual == "moment" and optimizer != "adamw":
            raise ValueError(
                f"residual={config.residual!r} trains no weights of dtype={dtype!r}: choose another of the two."
            )
        if lora is not None and config.target_modules == ALL_LINEAR_AND_CONV:
            raise ValueError(
                f"target_modules={config.target_modules!r} is no word of PEFT's, which {name} needs: name the "
                "modules, or leave such methods out."
            )
        if lora not in models:
            models[lora] = build(name, lora)
        of_method = on_lora if lora else config
        estimate = estimate_memory(models[lora], of_method, optimizer=optimizer, accumulates=accumulates)
        if batch_size is not None and sequence_length is not None:
            key = (lora, optimizer == LAYERWISE)
            if key not in peaks:  # whose state it is makes no difference
                peaks[key] = _peak_of_step(models[lora], batch_size, sequence_length, key[1], accumulates)
            estimate.activations = max(0, peaks[key] - estimate.gradients)
        return estimate

    found = {}
    for name in methods:
        try:
            found[name] = predict(name)
        except ValueError as error:
            if left_out is None:
                raise
            left_out[name] = str(error)
    return found


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live; those of `known` count as nothing."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            for part in int8.stored(tensor):
                self._add(part, 0)

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
            for part in int8.stored(leaf) if isinstance(leaf, Tensor) else []:
                self._add(part, part.untyped_storage().nbytes())
        return out


def _peak_of_step(
    model: nn.Module, batch_size: int, sequence_length: int, layerwise: bool = False, accumulates: bool = False
) -> int:
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
                for is_last in (False, True) if accumulates else (True,):
                    for p in (p for p in stand_ins.values() if layerwise and is_last and p.requires_grad):
                        p.register_post_accumulate_grad_hook(_free_gradient)
                    model(input_ids=tokens, labels=tokens).loss.backward()
    except (RuntimeError, TypeError) as error:  # what depends on the data, lacks a kernel, or takes no tokens
        raise ValueError(
            f"The activations of {type(model).__name__} cannot be predicted ({str(error).splitlines()[0]}): leave out "
            "batch size and sequence length."
        ) from error
    finally:
        for table, name, tensor in slots:
            table[name] = tensor
        model.train(training)
    return live.peak


def _free_gradient(p: Tensor) -> None:
    p.grad = None


def _like(tensor: Tensor) -> Tensor:
    parts = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu") for x in int8.stored(tensor)]
    empty = type(tensor)(*parts) if int8.is_int8(tensor) else parts[0]
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
