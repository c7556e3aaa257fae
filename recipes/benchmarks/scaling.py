"""What many devices send, keep and compute, on paper: LLaMAs of 1B to 70B parameters under FSDP2, 8 to 64 devices.

    python -m recipes.benchmarks.scaling [--devices 8,16,32,64] [--output FILE]

From shapes alone: the models are on the meta device, and nothing runs. `recipes.benchmarks.distributed` measures the
same quantities on a few processes, and the tests compare the two. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fira_hf import FiraConfig
from fira_hf.targets import find_targets
from recipes.benchmarks.models import SIZES
from recipes.benchmarks.options import write

FP32 = 4
MODELS = {
    name: {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
    }
    for name, size in (("1B", SIZES["1b"]), ("7B", SIZES["7b"]))
} | {
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def padded(rows: int, devices: int) -> int:
    """Rows when the part of each device is filled up to that of the first."""
    return -(-rows // devices) * devices


def step_bytes(rows: int, columns: int, rank: int, devices: int) -> int:
    """Bytes of the collectives of an ordinary step of a matrix (out, in) whose rows are split; an all-reduce counts
    twice.

    Three norms are added up. Of a wide matrix the partial low-rank gradients are added up as well, and each device
    gets some rows of the sum; the low-rank update then goes to all: each time (long, r + 1) numbers in fp32.
    """
    norms = 2 * 3 * FP32
    return norms if rows >= columns else norms + 2 * padded(columns, devices) * (rank + 1) * FP32


def refresh_bytes(rows: int, columns: int, rank: int, devices: int) -> int:
    """What a refresh by one warm power iteration adds; short side > `subspace.EXACT`.

    Two scalars are added up, and the terms of G^T (G Q), (short, r). Of a wide matrix it is G Q, (long, r), that is
    added up, and each device has some rows of the product.
    """
    scalars = 2 * 2 * FP32
    if rows >= columns:
        return scalars + 2 * columns * rank * FP32
    return scalars + (2 * columns + padded(rows, devices)) * rank * FP32


def refresh_flops(rows: int, columns: int, rank: int, devices: int, replicas: bool = False) -> float:
    """Floating-point operations of the matrix products of a refresh on the first device, where moments are rotated.

    Two products with the gradient are shared out. To orthonormalise (two passes of CholeskyQR, as on a CPU) and to
    compare with the old basis is work with the basis alone, which every device does; moments, (long, r), are rotated
    where they are. Replicas (DDP) find each basis on one of them, but all rotate all moments; theirs is a mean.
    """
    long, short = max(rows, columns), min(rows, columns)
    find, compare, rotate = 8 * short * rank**2, 2 * short * rank**2, 4 * rank**2
    products = 4 * columns * rank
    if replicas:
        return (products * rows + find) / devices + compare + rotate * long
    return (products * padded(rows, devices) + rotate * padded(long, devices)) / devices + find + compare


def state_bytes(rows: int, columns: int, rank: int, devices: int) -> int:
    """State of a matrix on the first device: its part of two moments, and the whole basis and two scalars."""
    long, short = max(rows, columns), min(rows, columns)
    return (2 * padded(long, devices) // devices + short) * rank * FP32 + 2 * FP32


def adamw_bytes(p: torch.Tensor, devices: int) -> int:
    """State of a weight in AdamW on the first device: its part of two moments in fp32, and a scalar."""
    return 2 * padded(len(p), devices) // devices * (p.numel() // len(p)) * FP32 + FP32


def cost(model: nn.Module, config: FiraConfig, devices: int) -> dict[str, float]:
    """What one of so many devices sends in a step, keeps as state, and computes in a refresh of all bases.

    Sent are (N - 1) / N of the bytes of the collectives: in an ordinary step (`ordinary_sent`), by a refresh of all
    bases beside that (`refresh_sent`), on average (`average_sent`), by gathering each projected gradient once in fp32
    (`gradients_sent`), and by FSDP2 itself, which in bf16 gathers the weights for forward and for backward and reduces
    the gradients (`fsdp_sent`). Weights are sharded in fp32, so that AdamW's moments are of fp32 as Fira's are.
    """
    plan = find_targets(model, config)
    shapes = [(*target.parameter.shape, target.rank) for target in plan.projected]
    others = [other.parameter for other in plan.skipped]
    share = (devices - 1) / devices
    ordinary = share * sum(step_bytes(*shape, devices) for shape in shapes)
    refresh = share * sum(refresh_bytes(*shape, devices) for shape in shapes)
    gradients = sum(padded(rows, devices) * columns * FP32 for rows, columns, _ in shapes)
    return {
        "ordinary_sent": ordinary,
        "refresh_sent": refresh,
        "average_sent": ordinary + refresh / config.update_proj_gap,
        "gradients_sent": share * gradients,
        "fsdp_sent": share * 3 * sum(2 * p.numel() for p in model.parameters()),
        "state_bytes": sum(state_bytes(*shape, devices) for shape in shapes)
        + sum(adamw_bytes(p, devices) for p in others),
        "basis_bytes": sum(min(shape[:2]) * shape[2] * FP32 for shape in shapes),
        "adamw_bytes": sum(adamw_bytes(p, devices) for p in model.parameters()),
        "refresh_flops": sum(refresh_flops(*shape, devices) for shape in shapes),
        "replica_refresh_flops": sum(refresh_flops(*shape, devices, replicas=True) for shape in shapes),
    }


def run(devices: list[int]) -> list[dict[str, Any]]:
    config, rows = FiraConfig(), []
    for name, settings in MODELS.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **settings))
        parameters = sum(p.numel() for p in model.parameters())
        shared = {"model": name, "parameters": parameters, "rank": config.rank, "gap": config.update_proj_gap}
        rows += [{**shared, "devices": count, **cost(model, config, count)} for count in devices]
    return rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=lambda text: [int(n) for n in text.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    rows = run(options.devices)
    table = Table("model", "devices", "MB sent: average", "FSDP2 itself", "state, GB", "AdamW", "refresh, TFLOP")
    for row in rows:
        cells = [row["average_sent"] / 1e6, row["fsdp_sent"] / 1e6, row["state_bytes"] / 1e9, row["adamw_bytes"] / 1e9]
        cells += [row["refresh_flops"] / 1e12]
        table.add_row(row["model"], str(row["devices"]), *(f"{cell:,.2f}" for cell in cells))
    Console().print(table)
    write("scaling", words, options, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
