"""Language models on the meta device as a training has them: with LoRA, in 4 bits, of int8 weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import int8
from .layers import target_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INT8 = "int8"  # as a dtype of weights


def build_on_meta(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The causal language model of a configuration, without its weights.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            kept = torch.bfloat16 if dtype == INT8 else getattr(torch, dtype)
            model = AutoModelForCausalLM.from_config(config, dtype=kept)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"transformers has no causal language model of type {config.model_type!r}: choose a language model."
            ) from error
        except Exception as error:  # sizes that do not go together, an activation that does not exist, ...
            raise ValueError(
                f"transformers makes no model of this configuration ({type(error).__name__}: {error}): correct its "
                "config.json."
            ) from error
    if dtype == INT8:
        int8.quantise(model)
    return model


def quantise(model: PreTrainedModel) -> None:
    """Makes of a model on the meta device what `BitsAndBytesConfig` (NF4, double quantisation) and PEFT's
    `prepare_model_for_kbit_training` make of it: all linear layers but the head in 4 bits, the rest in fp32, frozen.

    Products are computed in the dtype that the model has.
    """
    from peft import prepare_model_for_kbit_training

    dtype = model.dtype
    for layer in target_layers(model):
        if layer.is_linear and not layer.is_head:
            model.set_submodule(layer.name, _Linear4bit(model.get_submodule(layer.name), layer.transposed, dtype))
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


class Params4bit(nn.Parameter):
    """Named as that of bitsandbytes, since PEFT and `factory.summarize` know it by its name: two weights to a byte."""

    quant_state: Any


class _Linear4bit(nn.Linear):
    """By its shapes what bitsandbytes makes of a linear layer: for each product the weight is unpacked anew."""

    def __init__(self, layer: Any, transposed: bool, dtype: torch.dtype) -> None:
        rows, columns = layer.weight.shape[::-1] if transposed else layer.weight.shape
        super().__init__(columns, rows, bias=layer.bias is not None, device="meta", dtype=dtype)
        self.dtype = dtype
        blocks = -(-rows * columns // 64)
        self.weight = Params4bit(_numbers(-(-rows * columns // 2), 1, dtype=torch.uint8), requires_grad=False)
        of_scales = SimpleNamespace(absmax=_numbers(-(-blocks // 256)), code=_numbers(256), state2=None)
        self.weight.quant_state = SimpleNamespace(
            absmax=_numbers(blocks, dtype=torch.uint8), code=_numbers(16), offset=_numbers(()), state2=of_scales
        )

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Unpacked.apply(x.to(self.dtype), self.out_features)
        return (product if self.bias is None else product + self.bias.to(self.dtype)).to(x.dtype)


class _Unpacked(torch.autograd.Function):
    """x (..., in) -> (..., out) by a weight that is there for the product alone, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.shape = (rows, x.shape[-1])
        return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


def _numbers(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def add_lora(model: PreTrainedModel, rank: int, target_modules: str | list[str], trained: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if trained == "4-bit":
        quantise(model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=target_modules)
    wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    if trained == "all":
        wrapped.to(model.dtype)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad = ".base_layer." not in name
    return wrapped


def switch_on_checkpointing(model: Any) -> None:
    """Gradient checkpointing without re-entrance, in a PEFT model as well, by any transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
