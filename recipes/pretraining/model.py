"""The LLaMA that is trained, from its configuration, and what LoRA makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, LoraModel
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.pretraining.settings import RecipeArguments


def load_config(path: str) -> LlamaConfig:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no model_config {path}; those of the paper are experiments/<size>/config.json."
        )
    return LlamaConfig.from_json_file(path)


def build(config: LlamaConfig, arguments: RecipeArguments) -> LlamaForCausalLM:
    return LlamaForCausalLM._from_config(config, dtype=getattr(torch, arguments.dtype))


def add_lora(model: LlamaForCausalLM, arguments: RecipeArguments) -> LoraModel:
    """LoRA around the linear layers, in place. What it does not wrap is trained as it is: embeddings, norms, head.

    The model itself stays the one to train: its checkpoints then hold all weights, the frozen ones included, which
    restarts change.
    """
    lora = LoraModel(
        model,
        LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, target_modules="all-linear"),
        adapter_name="default",
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".base_layer." not in name
    return lora
