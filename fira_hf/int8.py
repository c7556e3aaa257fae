"""Weights of linear layers that are kept as int8, with a scale for each row: torchao's quantised training.

`quantize_(model, int8_weight_only_quantized_training())` of torchao makes them; forward and backward are torchao's,
and a gradient is a plain tensor of the dtype of the scales. A step takes rows of the weight as it is stored, about
`BLOCK` elements at a time: W = codes * scale in fp32, the update of `functional`, and codes again. They are rounded at
random, so that their mean is the value: an update far below the distance of two codes is made with its probability.

A row keeps its scale as long as its largest value lies between `LEAST` and 127 codes. Then what is not updated stays
to the last bit. A scale that followed the largest value from step to step would move every value of the row off its
code, and rounding would add noise to all of them. A new scale is never below the largest value / 127, whatever its
dtype: rounded down, it would cut off a part of that value again and again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import functional as F

MOST = 127  # the largest code
LEAST = 96  # the code of a row's largest value below which the row gets a finer scale
BLOCK = {"cpu": 2**18}  # elements that are taken together; elsewhere the cost is that of starting operations
BLOCK_ELSEWHERE = 2**22
TORCHAO = "torchao.prototype.quantized_training.int8"


def is_int8(p: Any) -> bool:
    """Whether it is torchao's tensor of codes and scales. torchao is looked up, not imported: without it there is
    none."""
    module = sys.modules.get(TORCHAO)
    return module is not None and isinstance(p, module.Int8QuantizedTrainingLinearWeight)


@dataclass(frozen=True)
class Int8Weight:
    """A matrix, or the transposed view of one: codes (rows, columns) int8 and scales (rows, 1), as they are stored."""

    codes: Tensor
    scales: Tensor
    is_turned: bool = False
    ndim: ClassVar[int] = 2

    @property
    def shape(self) -> torch.Size:
        return (self.codes.t() if self.is_turned else self.codes).shape

    def numel(self) -> int:
        return self.codes.numel()

    def stride(self) -> tuple[int, ...]:
        return (self.codes.t() if self.is_turned else self.codes).stride()

    def t(self) -> Int8Weight:
        return Int8Weight(self.codes, self.scales, not self.is_turned)

    def chunk(self, count: int) -> tuple[Int8Weight, ...]:
        """Parts along the stored rows."""
        return tuple(map(Int8Weight, self.codes.chunk(count), self.scales.chunk(count)))

    def blocks(self) -> Iterator[slice]:
        """Stored rows that are taken together."""
        rows, columns = self.codes.shape
        size = max(1, BLOCK.get(self.codes.device.type, BLOCK_ELSEWHERE) // max(1, columns))
        for start in range(0, rows, size):
            yield slice(start, min(rows, start + size))

    def read(self, rows: slice) -> Tensor:
        """Stored rows, a copy in fp32."""
        return self.codes[rows].to(torch.float32).mul_(self.scales[rows])

    def write(self, rows: slice, new: Tensor, active: Tensor | None, draws: torch.Generator) -> None:
        """`new` (fp32) is changed. `active`: 0-dim bool on the device; where it is False, everything stays."""
        coded = encode(new, self.scales[rows], draws)
        for old, now in zip((self.codes[rows], self.scales[rows]), coded, strict=True):
            old.copy_(now if active is None else torch.where(active, now, old))


def view(data: Tensor) -> Any:
    """What a step reads and writes: an `Int8Weight` of the same memory, or the tensor itself."""
    return Int8Weight(data.int_data, data.scale.unsqueeze(1)) if is_int8(data) else data  # type: ignore[attr-defined]


def stored(p: Any) -> list[Tensor]:
    """The tensors that a weight is kept in."""
    return [p.int_data, p.scale] if is_int8(p) else [p]


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes that weights are kept in, which an int8 weight has fewer of than its dtype says."""
    return sum(part.numel() * part.element_size() for p in tensors for part in stored(p))


def quantise(model: nn.Module) -> None:
    """Turns the weights of all linear layers into int8, as torchao's own function does.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.prototype.quantized_training import int8_weight_only_quantized_training
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ImportError("int8 weights are tensors of torchao: pip install torchao.") from error
    quantize_(model, int8_weight_only_quantized_training())


def encode(values: Tensor, scales: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes (int8) and scales of fp32 values (rows, columns), which are changed; `scales`, (rows, 1), are those so
    far. Values that are not finite have no codes."""
    finfo = torch.finfo(scales.dtype)
    least = torch.linalg.vector_norm(values, torch.inf, 1, keepdim=True).div_(MOST)
    before = scales.float()
    fits = (least <= before) & (least * MOST >= before * LEAST)
    # Up by one unit before it is rounded to the nearest, it is not below.
    scales = torch.where(fits, before, least.mul_(1 + finfo.eps).clamp_(min=finfo.tiny)).to(scales.dtype)
    values.div_(scales.float())
    codes = values.floor()
    # The fraction is exact, and that of a value that has not moved is zero.
    noise = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=draws)
    codes.add_(noise < values.sub_(codes))
    return codes.clamp_(-MOST, MOST).to(torch.int8), scales


def apply_updates(weights: Sequence[Int8Weight], *others: Any) -> None:
    """See `functional.apply_updates`; there are seeds."""
    update: dict[str, Any] = {"update": apply_update}
    F.apply_updates(weights, *others, **update)  # type: ignore[arg-type]


def apply_update(
    W: Int8Weight,
    G: Tensor,
    A: Tensor,
    Q: F.Basis,
    B: Tensor | None,
    decay: float,
    active: Tensor | None,
    draws: torch.Generator,
) -> None:
    """See `functional.apply_update`, whose update of blocks of fp32 this is."""
    for rows in W.blocks():
        new = W.read(rows)
        if W.is_turned:  # stored rows are columns of the short side
            q = range(Q.start - rows.start, Q.stop - rows.start) if isinstance(Q, range) else Q[rows]
            F.apply_update(new.t(), G[:, rows], A, q, B, decay)
        else:
            F.apply_update(new, G[rows], A[rows], Q, None if B is None else B[rows], decay)
        W.write(rows, new, active, draws)


def dense_adamw(
    W: Int8Weight,
    G: Tensor,
    moments: Sequence[Tensor],
    count: Tensor,
    finite: Tensor,
    seed: int | None,
    state_seed: int | None,
    settings: dict[str, Any],
) -> None:
    """See `functional.dense_adamw`, whose update of blocks of fp32 this is."""
    draws = F.generator(G, seed)
    assert draws is not None
    for rows in W.blocks():
        new, (m, v) = W.read(rows), (moment[rows] for moment in moments)
        seed_of_rows = None if state_seed is None else state_seed + rows.start
        F.dense_adamw([new], [G[rows]], [m], [v], [count.clone()], finite, [None], [seed_of_rows], settings)
        W.write(rows, new, finite, draws)


PARTS = {"int_data": "weight_codes", "scale": "weight_scale"}  # as torchao calls them, and as they are saved


def save_as_parts(model: nn.Module) -> None:
    """Makes state dicts of the model hold `weight_codes` and `weight_scale` in place of each int8 `weight`, and be
    loaded from these: as a tensor of torchao it goes into no safetensors file. Once or several times is the same.
    """
    for module in model.modules():
        if is_int8(getattr(module, "weight", None)) and _split not in module._state_dict_hooks.values():
            module._register_state_dict_hook(_split)
            module.register_load_state_dict_pre_hook(_join)


def _split(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if is_int8(state_dict.get(f"{prefix}weight")):
        weight = state_dict.pop(f"{prefix}weight")
        state_dict.update((prefix + name, getattr(weight, part)) for part, name in PARTS.items())


def _join(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Each part by itself: they may be in different files."""
    for part, name in PARTS.items():
        if prefix + name in state_dict and is_int8(module.weight):
            with torch.no_grad():
                getattr(module.weight, part).copy_(state_dict.pop(prefix + name))
            state_dict[f"{prefix}weight"] = module.weight.detach()


def dequantised(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before torchao quantised it, on the CPU, in the dtype of the scales:
    `model.save_pretrained(folder, state_dict=dequantised(model))` is for those who use the model."""
    found = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in PARTS.values():
            name, value = f"{owner}.weight", model.get_parameter(f"{owner}.weight").detach()
        found[name] = (value.dequantize() if is_int8(value) else value).cpu()
    return found
