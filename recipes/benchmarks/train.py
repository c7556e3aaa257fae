"""Tokens per second of whole Trainer steps: forward, backward and the optimizer.

    python -m recipes.benchmarks.train [--size 60m] [--batch_size 8] [--output FILE]

The methods train a LLaMA of random weights on random tokens, turn by turn; the figures are medians of the repeats, and
leave out the first step, which builds the state. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fira_hf  # noqa: F401  registers optim="fira"
from recipes.benchmarks.models import SIZES
from recipes.benchmarks.options import parser as command_line
from recipes.benchmarks.options import write

METHODS = {
    "adamw_torch_fused": "",
    "fira": "rank={rank}, update_proj_gap={gap}",
    "galore_adamw": "rank={rank}, update_proj_gap={gap}, scale=0.25",
}


class Clock(TrainerCallback):
    """The time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def seconds_a_step(method: str, options: argparse.Namespace, folder: str) -> float:
    size = SIZES[options.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=options.layers or size.layers,
        num_attention_heads=size.hidden // 64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    tokens = torch.randint(0, options.vocab_size, (options.batch_size, options.sequence_length))
    rows = [{"input_ids": row, "labels": row} for row in tokens] * (options.steps + 1)
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=folder,
        optim=method,
        optim_args=METHODS[method].format(rank=options.rank or size.rank, gap=options.gap) or None,
        optim_target_modules=["attn", "mlp"] if method != "adamw_torch_fused" else None,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps + 1,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    return (clock.ends[-1] - clock.ends[0]) / options.steps


def main(words: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="measured steps in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    options = parser.parse_args(words)
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    times: dict[str, list[float]] = {method: [] for method in options.methods}
    failed: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for method in [name for name in times if name not in failed]:
                try:
                    times[method].append(seconds_a_step(method, options, folder))
                except ImportError as error:
                    failed[method] = {"error": str(error)}
    tokens = options.batch_size * options.sequence_length
    found: dict[str, dict[str, Any]] = {
        method: {"tokens_per_second": tokens / statistics.median(seconds), "seconds_a_step": seconds}
        for method, seconds in times.items()
        if method not in failed
    }
    table = Table("method", "tokens/s", "of adamw_torch_fused")
    base = found.get("adamw_torch_fused", {}).get("tokens_per_second")
    for method, row in found.items():
        speed = row["tokens_per_second"]
        table.add_row(method, f"{speed:,.0f}", f"{speed / base:.2f}" if base else "-")
    Console().print(table)
    write("train", words, options, methods=found | failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
