"""Which learning rate and rank serve on LoRA's matrices: AdamW, Fira here, and pytorch_optimizer's Fira.

    python -m recipes.benchmarks.lora_rates --data data/english data/german [--output FILE]

A small LLaMA is trained on the bytes of one text. Then each method fine-tunes LoRA's matrices on another text, at
rates of the grid 1, 3, 10 until the best one is bracketed; all methods see the same blocks. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from recipes import errors, measure
from recipes.benchmarks.models import Size
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.options import write
from recipes.benchmarks.quality.plan import best, missing_rates
from recipes.benchmarks.quality.train import LINEAR, Data, batches, build_model, load, schedule, validate

SIZE = Size(128, 352, 4, 2, 16)
SEQUENCES = 4  # of a step
VALID = 64  # blocks
FIRST = 1e-3  # of the searches
SHARES = {"half": 2, "all": 1, "a quarter": 4}  # of LoRA's dim


def methods(dim: int) -> dict[str, dict[str, Any]]:
    """name -> optimizer, rank, interval and settings of its parameter group."""
    found: dict[str, dict[str, Any]] = {"adamw": {"optimizer": "adamw"}}
    for share, parts in SHARES.items():
        ours = {"optimizer": "fira_hf", "rank": dim // parts, "interval": 10}
        found[f"fira_hf, rank {share}"] = ours | {"settings": {"alpha": 1.0}}
        # As the scripts around musubi-tuner set it, with the rank at LoRA's dim.
        theirs = {"optimizer": "pytorch-optimizer", "rank": dim // parts, "interval": 50, "settings": {"scale": 1.0}}
        found[f"pytorch_optimizer, rank {share}"] = theirs
    half = {"optimizer": "fira_hf", "rank": dim // 2, "interval": 10}
    found["fira_hf, rank half, adjust_lr none"] = half | {"settings": {"alpha": 1.0, "adjust_lr": "none"}}
    for gamma in (1.01, None):
        found[f"fira_hf, rank half, gamma {gamma}"] = half | {"settings": {"alpha": 1.0, "gamma": gamma}}
    return found


def pretrain(data: Data, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0, fused=True)
    _train(model, optimizer, data, steps, 0)
    return model


def finetune(
    base: nn.Module, data: Data, method: dict[str, Any], lr: float, dim: int, steps: int, seed: int
) -> dict[str, Any]:
    """Of one run the validation loss in nats a byte (None: it diverged) and the bytes of its state."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=dim, lora_alpha=dim, target_modules=LINEAR))
    matrices = [p for p in model.parameters() if p.requires_grad]
    rank, gap = method.get("rank", dim), method.get("interval", 10)
    optimizer = build(method["optimizer"], matrices, lr, rank, gap, **method.get("settings", {}))
    _train(model, optimizer, data, steps, seed)
    loss = validate(model, torch.from_numpy(data.valid[:VALID]).long())
    state = measure.state_bytes(optimizer)
    return {"lr": lr, "seed": seed, "loss": loss if math.isfinite(loss) else None, "state_bytes": state}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int, seed: int) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _, batch in zip(range(steps), batches(data.train, SEQUENCES, seed), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        if not math.isfinite(loss.item()):
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def search(base: nn.Module, data: Data, method: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs at one rate after another until the best is bracketed, then the best with the other seeds."""
    runs: dict[float, dict[str, Any]] = {}
    shape = (options.dim, options.steps)
    while missing := missing_rates({lr: _loss(run) for lr, run in runs.items()}, FIRST):
        for lr in missing:
            runs[lr] = finetune(base, data, method, lr, *shape, 0)
    lr = best({lr: _loss(run) for lr, run in runs.items()})
    others = [finetune(base, data, method, lr, *shape, seed) for seed in range(1, options.seeds)]
    return sorted([*runs.values(), *others], key=lambda run: (run["lr"], run["seed"]))


def _loss(run: dict[str, Any]) -> float:
    return math.inf if run["loss"] is None else run["loss"]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = "folders with train.txt and valid.txt: the text that the base learns, and that LoRA learns"
    parser.add_argument("--data", required=True, nargs=2, metavar="FOLDER", help=texts)
    parser.add_argument("--dim", type=int, default=16, help="of LoRA; default: 16")
    parser.add_argument("--steps", type=int, default=60, help="of each LoRA; default: 60")
    parser.add_argument("--base_steps", type=int, default=300, help="of the base; default: 300")
    parser.add_argument("--seeds", type=int, default=2, help="at the best rate of each method; default: 2")
    parser.add_argument("--methods", type=lambda text: text.split(";"), help="with ; between; default: all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    try:
        english, german = map(load, options.data)
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    base = pretrain(english, options.base_steps)
    before = validate(base, torch.from_numpy(german.valid[:VALID]).long())
    print(f"before: {before:.3f}", flush=True)
    found: dict[str, Any] = {}
    for name, method in methods(options.dim).items():
        if options.methods and name not in options.methods:
            continue
        found[name] = {"method": method, "runs": search(base, german, method, options)}
        print(name, *(f"{r['lr']:g}: {_loss(r):.3f}" for r in found[name]["runs"]), sep="  ", flush=True)
        texts = [{"name": one.name, "digest": one.digest} for one in (english, german)]  # of the base, of LoRA
        write("lora_rates", words, options, texts=texts, before=before, methods=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
