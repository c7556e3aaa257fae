"""What every page of the docs may take for granted: a tiny model and data, and a hub that yields such models."""

from __future__ import annotations

import tempfile

import torch
import transformers

from conftest import build_llama, build_tokens

__all__ = ["dataloader", "eval_dataset", "model", "train_dataset"]


def from_hub(quantization_config=None, **settings):
    if quantization_config is None:
        return build_llama()
    with tempfile.TemporaryDirectory() as folder:  # only what is loaded is quantised
        build_llama().save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization_config)


model = build_llama()
train_dataset = build_tokens()
eval_dataset = build_tokens(8, seed=2)
dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=2)
transformers.AutoModelForCausalLM.from_pretrained = lambda name, **settings: from_hub(**settings)
transformers.AutoTokenizer.from_pretrained = lambda name: lambda text: {"input_ids": [ord(c) % 64 for c in text]}
