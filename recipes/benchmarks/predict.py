"""Predicted memory beside the paper's: pre-training (cells), and fine-tuning LLaMA-7B on one GPU (llama7b), with its
linear weights in int8 (int8).

    python -m recipes.benchmarks.predict cells [--output docs/benchmarks/cells.json]
    python -m recipes.benchmarks.predict llama7b [--output docs/benchmarks/llama7b.json]
    python -m recipes.benchmarks.predict int8 [--output docs/benchmarks/int8.json]

By `predict_memory`, as the command `fira-hf memory`, from the models' configurations. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from fira_hf import FiraConfig
from fira_hf.config import LAYERWISE
from fira_hf.memory import MemoryEstimate, estimate_memory, predict_memory
from fira_hf.meta_models import build_on_meta, switch_on_checkpointing
from recipes.benchmarks.models import SIZES
from recipes.benchmarks.options import write
from recipes.commonsense.settings import RECIPE as COMMONSENSE
from recipes.pretraining.settings import RECIPE as PRETRAINING

# What the paper prints, in its G, which is 1.024e9 bytes; and the parameters that the models are named by (the largest
# is called 1B, and has 1.34e9).
PUBLISHED = {
    "60m": {"Full-rank": 0.48, "Fira": 0.36, "GaLore": 0.36, "LoRA": 0.44, "ReLoRA": 0.44},
    "130m": {"Full-rank": 1.01, "Fira": 0.77, "GaLore": 0.77, "LoRA": 0.99, "ReLoRA": 0.99},
    "350m": {"Full-rank": 2.74, "Fira": 1.90, "GaLore": 1.90, "LoRA": 2.12, "ReLoRA": 2.12},
    "1b": {"Full-rank": 10.40, "Fira": 6.98, "GaLore": 6.98, "LoRA": 7.36, "ReLoRA": 7.36},
}
G = 1.024e9
NOMINAL = {"60m": 60e6, "130m": 130e6, "350m": 350e6, "1b": 1.33e9}
METHODS = {"Full-rank": "adamw", "Fira": "fira", "GaLore": "galore", "LoRA": "relora", "ReLoRA": "relora"}
BF16 = 2


def load(path: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(str(path / "config.json"))


def cells() -> list[dict[str, Any]]:
    """Each cell: as published, by the formulas that it follows, and as predicted from the configuration, in bytes.

    The formulas: with W the bytes of the weights by their nominal number, and L those of LoRA's matrices, embeddings
    and head, all in bf16, 4 W for full rank, W + 4 L for LoRA, and 2 W + 3/2 L for GaLore and Fira.
    """
    rows = []
    for size, published in PUBLISHED.items():
        config = load(PRETRAINING.experiments / size)
        names = sorted(set(METHODS.values()))
        found = predict_memory(config, names, FiraConfig(SIZES[size].rank, state_dtype="bfloat16"))
        weights, lora = BF16 * NOMINAL[size], found["relora"].gradients
        low_rank = 2 * weights + 1.5 * lora
        formulas = {"adamw": 4 * weights, "relora": weights + 4 * lora, "galore": low_rank, "fira": low_rank}
        for name, value in published.items():
            one = found[METHODS[name]]
            row = {"size": size, "method": name, "published": value, "formula": formulas[METHODS[name]] / G}
            rows.append({**row, **asdict(one), "total": one.total})
    return rows


def finetuning(batch_size: int | None = None) -> dict[str, MemoryEstimate]:
    """The published fine-tuning of LLaMA-7B, in bf16 with gradient checkpointing, on batches of 256 tokens each."""
    config = load(COMMONSENSE.experiments / "llama7b")
    shape: dict[str, Any] = {}
    if batch_size is not None:
        shape = {"batch_size": batch_size, "sequence_length": 256, "gradient_checkpointing": True}
    published = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    full = predict_memory(config, ("adamw", "fira", "fira_layerwise", "galore"), FiraConfig(16), **shape)
    on_lora = FiraConfig(16, target_modules=published)
    return full | predict_memory(config, ("fira-on-lora", "lora"), on_lora, lora_rank=32, **shape)


def llama7b() -> list[dict[str, Any]]:
    """Each method with batches of 1 and of 4, in bytes."""
    return [
        {"method": name, "batch_size": batch, **asdict(one), "total": one.total}
        for batch in (1, 4)
        for name, one in finetuning(batch).items()
    ]


# What becomes of embedding and head, which AdamW trains unless they are named.
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "projected": {"target_modules": r".*_proj|lm_head", "target_parameters": ["model.embed_tokens.weight"]},
    "frozen": {},
}


def int8(batch_size: int | None = 1) -> list[dict[str, Any]]:
    """LLaMA-7B with its linear weights in int8, stepped inside backward on 256 tokens each, checkpointed; in bytes."""
    rows = []
    model = build_on_meta(load(COMMONSENSE.experiments / "llama7b"), "int8")
    switch_on_checkpointing(model)
    for embeddings, targets in EMBEDDINGS.items():  # frozen come last
        if embeddings == "frozen":
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.requires_grad_(False)
        activations = 0
        for rank, state_dtype in itertools.product((128, 256, 512), ("float32", "bfloat16", "int8")):
            config = FiraConfig(rank, state_dtype=state_dtype, **targets)
            batch = (None, None) if activations or batch_size is None else (batch_size, 256)
            one = estimate_memory(model, config, *batch, optimizer=LAYERWISE)
            activations = one.activations = one.activations or activations  # the same for all
            row = {"embeddings": embeddings, "rank": rank, "state_dtype": state_dtype}
            rows.append({**row, **asdict(one), "total": one.total})
    return rows


TABLES = {"cells": cells, "llama7b": llama7b, "int8": int8}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    rows = TABLES[options.table]()
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row.values()))
    Console().print(table)
    write("predict", words, options, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
