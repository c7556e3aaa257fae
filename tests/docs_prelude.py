"""What every page of the docs may take for granted: a tiny model and data, and a hub that yields such models."""

from __future__ import annotations

import torch
import transformers

from conftest import build_llama, build_tokens

__all__ = ["dataloader", "eval_dataset", "model", "train_dataset"]

model = build_llama()
train_dataset = build_tokens()
eval_dataset = build_tokens(8, seed=2)
dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=2)
transformers.AutoModelForCausalLM.from_pretrained = lambda name, **settings: build_llama()
transformers.AutoTokenizer.from_pretrained = lambda name: lambda text: {"input_ids": [ord(c) % 64 for c in text]}
