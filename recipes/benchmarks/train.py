"""Tokens per second and peak memory of whole Trainer steps: forward, backward and the optimizer.

    python -m recipes.benchmarks.train [--size 60m] [--batch_size 8] [--output FILE]
    python -m recipes.benchmarks.train --size 7b --dtype bfloat16 --batch_size 1 --gradient_checkpointing --repeats 1

The methods train a LLaMA of random weights on random tokens, turn by turn; the figures are medians of the repeats, and
leave out the first step, which builds the state. Memory is predicted from the shapes; on a GPU it is measured as well.
Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from fira_hf import FiraConfig, int8
from fira_hf.memory import estimate_memory
from fira_hf.meta_models import switch_on_checkpointing
from recipes import errors
from recipes.benchmarks.models import SIZES
from recipes.benchmarks.options import parser as command_line
from recipes.benchmarks.options import write

FULL = ["attn", "mlp"]  # parts of the names of the layers that are projected
LORA = ["lora_A", "lora_B"]
# method -> whether LoRA wraps the model, the optimizer, its arguments, what it projects
METHODS: dict[str, tuple[bool, str, str | None, list[str] | None]] = {
    "adamw-full": (False, "adamw_torch_fused", None, None),
    "fira-full": (False, "fira", "rank={rank}", FULL),
    "fira-layerwise": (False, "fira_layerwise", "rank={rank}", FULL),
    "galore-full": (False, "galore_adamw", "rank={rank}, update_proj_gap={gap}, scale=0.25", FULL),
    "lora": (True, "adamw_torch_fused", None, None),
    "fira-on-lora": (True, "fira", "rank=16", LORA),
}


class Clock(TrainerCallback):
    """The time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def model_config(options: argparse.Namespace) -> LlamaConfig:
    size = SIZES[options.size]
    return LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=options.layers or size.layers,
        num_attention_heads=size.heads,
        use_cache=False,
    )


def build_model(options: argparse.Namespace, lora: bool, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if options.dtype == "int8" else getattr(torch, options.dtype)
        model = LlamaForCausalLM._from_config(model_config(options), dtype=dtype)
        if options.dtype == "int8":
            int8.quantise(model)
        if lora:  # the published adapter
            targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=targets))
    return model


def run_once(method: str, options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Seconds a step, and the measured peak in bytes (0 on the CPU)."""
    lora, optim, words, targets = METHODS[method]
    model = build_model(options, lora, options.device)
    tokens = torch.randint(0, options.vocab_size, (options.batch_size, options.sequence_length))
    rows = [{"input_ids": row, "labels": row} for row in tokens] * (options.steps + 1)
    clock = Clock()
    rank = options.rank or SIZES[options.size].rank
    arguments = TrainingArguments(
        output_dir=folder,
        optim=optim,
        optim_args=words and words.format(rank=rank, gap=options.gap),
        optim_target_modules=targets,
        max_grad_norm=options.max_grad_norm,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps + 1,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": (clock.ends[-1] - clock.ends[0]) / options.steps, "peak": peak}


def predict(method: str, options: argparse.Namespace) -> int:
    """Peak bytes of the method, from the shapes alone."""
    lora, optim, *_ = METHODS[method]
    model = build_model(options, lora, "meta")
    if options.gradient_checkpointing:
        switch_on_checkpointing(model)
    batch = (options.batch_size, options.sequence_length)
    if optim.startswith("adamw"):
        return estimate_memory(model, None, *batch).total
    config = FiraConfig(rank=16 if lora else options.rank or SIZES[options.size].rank)
    return estimate_memory(model, config, *batch, optimizer={"galore_adamw": "galore"}.get(optim, optim)).total


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """method -> tokens per second, seconds of each step's mean, and bytes at the peak, measured and predicted."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for method in [name for name in runs if name not in found]:
                try:
                    runs[method].append(run_once(method, options, folder))
                except (ImportError, torch.OutOfMemoryError) as error:
                    found[method] = {"error": errors.named(error)}
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    for method in runs:
        seconds = [run["seconds"] for run in runs[method]]
        found[method] = found.get(method) or {
            "seconds_a_step": seconds,
            "tokens_per_second": options.batch_size * options.sequence_length / statistics.median(seconds),
            "peak_bytes": max(run["peak"] for run in runs[method]) or None,
        }
        found[method]["predicted_bytes"] = predict(method, options)
    return {method: found[method] for method in options.methods}


def main(words: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    parser = command_line(__doc__)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--gap", type=int, default=200, help="GaLore's interval; fira_hf has its defaults")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping, for fira-layerwise")
    parser.add_argument("--steps", type=int, default=5, help="measured steps in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["adamw-full", "fira-full"])
    options = parser.parse_args(words)
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    found = run(options)
    table = Table("method", "tokens/s", "s a step", "peak, GiB", "predicted, GiB")
    for method in options.methods:
        row = found[method]
        memory = [f"{row[key] / 2**30:.2f}" if row.get(key) else "-" for key in ("peak_bytes", "predicted_bytes")]
        if "error" in row:
            table.add_row(method, row["error"], "-", *memory)
            continue
        step = f"{statistics.median(row['seconds_a_step']):.3f}"
        table.add_row(method, f"{row['tokens_per_second']:,.0f}", step, *memory)
    Console().print(table)
    write("train", words, options, methods=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
