"""Peak memory of a whole training step in which each weight is stepped inside backward, beside an ordinary one.

    python -m recipes.benchmarks.layerwise [--size 60m] [--sequence_length 256] [--output FILE]

Forward with gradient checkpointing, backward and step of a LLaMA of random weights on random tokens. Counted: every
allocation of one step, when weights and state are there. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch

from fira_hf import FiraConfig, get_fira_optimizer, int8
from fira_hf.layerwise import step_in_backward
from recipes import measure
from recipes.benchmarks.memory import peak_bytes
from recipes.benchmarks.models import SIZES
from recipes.benchmarks.options import parser as command_line
from recipes.benchmarks.options import write
from recipes.benchmarks.step import timed
from recipes.benchmarks.train import build_model

METHODS = ("adamw", "fira", "fira_layerwise")


def run_once(
    method: str, options: argparse.Namespace, state_dtype: str = "float32", card: int | None = None
) -> dict[str, Any]:
    """`card`: bytes that PyTorch may take of a GPU, from when the model is there."""
    model = build_model(options, False, options.device)
    if card is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / torch.cuda.get_device_properties(0).total_memory))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer: torch.optim.Optimizer
    if method == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    else:
        rank = options.rank or SIZES[options.size].rank
        optimizer = fira = get_fira_optimizer(model, FiraConfig(rank=rank, state_dtype=state_dtype))
        if method == "fira_layerwise":
            step_in_backward(fira)
    shape = (options.batch_size, options.sequence_length)
    tokens = torch.randint(0, options.vocab_size, shape, device=options.device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    first = peak_bytes(step)  # with the state, which is made in it
    step()  # buffers that are made once
    gc.collect()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return {
        "weight_bytes": int8.nbytes(model.parameters()),
        "state_bytes": measure.state_bytes(optimizer),
        "first_peak_bytes": first,
        "peak_bytes": peak_bytes(step),
        "seconds_a_step": [timed(step) for _ in range(3)],
        "largest_gradient_bytes": max(sizes),
    }


def main(words: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    parser = command_line(__doc__)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--sequence_length", type=int, default=256)
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = {method: run_once(method, options) for method in METHODS}
    table = Table("bytes", "weights", "state", "peak of a step beyond both")
    for method, row in found.items():
        table.add_row(method, *(f"{row[key]:,}" for key in ("weight_bytes", "state_bytes", "peak_bytes")))
    Console().print(table)
    write("layerwise", words, options, bytes=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
