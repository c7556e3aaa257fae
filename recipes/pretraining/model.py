"""The model that is trained: a LLaMA from its configuration, or one that is pretrained."""

from __future__ import annotations

from pathlib import Path

import torch
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
