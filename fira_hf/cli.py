"""What a training would need and project, from a model's configuration alone.

fira-hf memory --model PATH_OR_NAME [--method fira,adamw,...] [--rank R] [--preset NAME]
               [--batch_size B --sequence_length L] [--gradient_accumulation_steps N]
fira-hf inspect --model PATH_OR_NAME [--rank R] [--preset NAME] [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from .config import ALL_LINEAR, FULL_RANK, PRESETS, WORDS, FiraConfig, with_preset
from .factory import summarize
from .memory import METHODS, TRAIN_INT8, MemoryEstimate, predict_memory
from .meta_models import INT8, build_on_meta
from .targets import find_targets

GIB = 2**30
COLUMNS = ("weights", "gradients", "optimizer_state", "activations", "total")
DTYPES = ("bfloat16", "float16", "float32", INT8)
# Settings of Fira that decide how large its state is, beside the rank.
OF_STATE = ("state_dtype", "base_optimizer", "projection", "residual")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fira-hf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    memory = commands.add_parser("memory", help="bytes of weights, gradients, optimizer state and activations")
    inspect = commands.add_parser("inspect", help="which weights Fira would project, and what a checkpoint holds")
    for one in (memory, inspect):
        one.add_argument("--model", required=True, help="folder, config.json or name on the hub")
        one.add_argument("--preset", help=f"settings of Fira: {', '.join(PRESETS)}; options beside it take precedence")
        one.add_argument("--rank", type=int, help=f"of the projection (default: {FiraConfig.rank})")
        one.add_argument(
            "--target_modules",
            nargs="+",
            default=[ALL_LINEAR],
            metavar="NAME",
            help=f"names of layers, exact or a dotted suffix, or one of {', '.join(WORDS)} (default: {ALL_LINEAR})",
        )
        one.add_argument(
            "--dtype",
            choices=DTYPES,
            default=DTYPES[0],
            help="of the weights; int8: of linear layers, by torchao, the rest bfloat16 (default: %(default)s)",
        )
        for name in OF_STATE:
            one.add_argument(f"--{name}", help=f"of Fira (default: {getattr(FiraConfig, name)})")
    memory.add_argument(
        "--method",
        help=f"one or more, with commas between (default: {','.join(METHODS)}; for int8 {','.join(TRAIN_INT8)})",
    )
    memory.add_argument("--lora_rank", type=int, help="of LoRA's A and B (default: --rank)")
    memory.add_argument("--batch_size", type=int, help="sequences on the device at once; for activations")
    memory.add_argument("--sequence_length", type=int, help="tokens in a sequence; for activations")
    memory.add_argument("--gradient_checkpointing", action="store_true", help="keep one activation a layer")
    memory.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="batches of a step; from 2 on all gradients are held, by fira_layerwise, too (default: %(default)s)",
    )
    memory.add_argument("--json", action="store_true", help="bytes as JSON in place of a table")
    inspect.add_argument("--checkpoint", type=Path, help="folder with optimizer.pt, as the Trainer saves it")
    return parser


def load_config(model: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # what transformers makes of a file that says nonsense is of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        missing = "no folder or config.json here that says what model it is, nor a name on the hub"
        found = "its config.json cannot be read as that of a model" if Path(model).exists() else missing
        raise ValueError(f"--model {model}: {found}. ({reason})") from error
    if getattr(config, "quantization_config", None):
        print(
            f"note: {model} is quantised; weights are counted as if they were not. For a base in 4 bits see "
            "--method qlora,fira-on-qlora.",
            file=sys.stderr,
        )
    return config


def table(found: dict[str, MemoryEstimate]) -> str:
    rows = [["GiB", *(column.replace("_", " ") for column in COLUMNS)]]
    rows += [[name, *(f"{getattr(one, key) / GIB:.2f}" for key in COLUMNS)] for name, one in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def config_of(options: argparse.Namespace) -> FiraConfig:
    """What is given, over the settings of the preset."""
    given = {name: value for name in ("rank", *OF_STATE) if (value := getattr(options, name)) is not None}
    settings = with_preset({"preset": options.preset} | given, "--preset")
    return FiraConfig(target_modules=options.target_modules, **settings)


def memory(options: argparse.Namespace, model_config: PretrainedConfig) -> str:
    config = config_of(options)
    default = TRAIN_INT8 if options.dtype == INT8 else tuple(METHODS)
    if config.rank >= FULL_RANK and options.lora_rank is None:  # of a preset; no rank for A and B
        default = tuple(name for name in default if METHODS[name].lora is None)
    named = [name.strip() for name in options.method.split(",")] if options.method else None
    left_out: dict[str, str] = {}
    found = predict_memory(
        model_config,
        named or default,
        config,
        lora_rank=options.lora_rank,
        dtype=options.dtype,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        left_out=None if named else left_out,
    )
    if not found:
        raise ValueError(next(iter(left_out.values())))
    if options.json:
        rows: dict[str, dict[str, Any]] = {name: asdict(one) | {"total": one.total} for name, one in found.items()}
        return json.dumps(rows | {name: {"error": reason} for name, reason in left_out.items()}, indent=2)
    return "\n".join([table(found), *(f"{name} is left out: {reason}" for name, reason in left_out.items())])


def inspect(options: argparse.Namespace, model_config: PretrainedConfig) -> str:
    config = config_of(options)
    model = build_on_meta(model_config, options.dtype)
    lines = [summarize(model, find_targets(model, config), config)]
    if options.checkpoint is not None:
        lines.append(describe_checkpoint(options.checkpoint))
    return "\n".join(lines)


def describe_checkpoint(folder: Path) -> str:
    """Bytes, ranks and steps of the optimizer state in a checkpoint."""
    path = folder / "optimizer.pt"
    if not path.is_file():
        raise ValueError(f"--checkpoint {folder}: there is no optimizer.pt; give a checkpoint-N of the Trainer.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"--checkpoint {folder}: optimizer.pt is damaged, or holds objects of Python, as GaLore's does."
        ) from error
    try:
        rank_of = {i: group["rank"] for group in saved["param_groups"] if "rank" in group for i in group["params"]}
        states = saved["state"].values()
        held = sum(tensor.nbytes for state in states for tensor in state.values() if isinstance(tensor, Tensor))
        projected = {i: state for i, state in saved["state"].items() if "residual_norm" in state}
        ranks = sorted({rank_of[i] for i in projected})
        steps = 1 + max(state["calls"] for state in projected.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of anything that can be in a file
        raise ValueError(f"--checkpoint {folder}: optimizer.pt holds no state of Fira.") from error
    return f"{path}: {held:,} bytes of state, rank {', '.join(map(str, ranks))}, after {steps} steps."


def main(words: list[str] | None = None) -> int:
    options = build_parser().parse_args(words)
    if len(options.target_modules) == 1 and options.target_modules[0] in WORDS:
        options.target_modules = options.target_modules[0]
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers will drop
        try:
            print({"memory": memory, "inspect": inspect}[options.command](options, load_config(options.model)))
        except (ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
