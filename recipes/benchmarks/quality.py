"""Pre-train a small LLaMA with every variant of an experiment, at equal tokens, and compare validation perplexity.

    python -m recipes.benchmarks.quality recipes/benchmarks/quality.yaml --output_dir runs/quality --data_dir DATA
        [--variants adamw,power] [--learning_rates 1e-3] [--seeds 0,1]

DATA holds train.txt and valid.txt. Writes one JSON for each variant, learning rate and seed, and skips those that are
there: the same command continues an interrupted experiment, and commands with different choices can share a folder.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import files, measure
from recipes.benchmarks.optimizers import build
from recipes.text import blocks, train_tokenizer


def load_tokens(data_dir: Path, cache: Path, vocab_size: int) -> dict[str, Tensor]:
    """ "train" and "valid" as token ids, by a byte-level BPE that is trained on train.txt; cached."""
    cache.mkdir(parents=True, exist_ok=True)
    vocabulary = cache / f"bpe-{vocab_size}.json"
    if vocabulary.is_file():
        tokenizer = Tokenizer.from_file(str(vocabulary))
    else:
        with (data_dir / "train.txt").open(encoding="utf-8") as lines:
            tokenizer = train_tokenizer(lines, vocab_size)
        tokenizer.save(str(vocabulary))
    tokens = {}
    for split in ("train", "valid"):
        path = cache / f"{split}-{vocab_size}.pt"
        if not path.is_file():
            text = (data_dir / f"{split}.txt").read_text(encoding="utf-8")
            torch.save(torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32), path)
        tokens[split] = torch.load(path)
    return tokens


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, batch_size: int) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in data.split(batch_size)]
    model.train()
    return math.exp(min(sum(losses) / len(data), 50.0))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of attention and MLP, as in the published pre-training, and the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ("attn" in name or "mlp" in name)]
    chosen = set(matrices)
    return matrices, [p for p in model.parameters() if p not in chosen]


class Weights:
    """The matrices that the optimizer sees: those of the model, or copies in half precision.

    With a dtype, the model computes in fp32 with weights that are always values of that dtype, which is training in
    that dtype but for the activations, and fast on CPUs whose half-precision products are slow.
    """

    def __init__(self, matrices: list[nn.Parameter], dtype: torch.dtype | None) -> None:
        self.model = matrices
        self.seen = matrices if dtype is None else [nn.Parameter(p.detach().to(dtype)) for p in matrices]
        self.to_model()

    def to_optimizer(self) -> None:
        for own, seen in zip(self.model, self.seen, strict=True):
            if own is not seen:
                seen.grad = own.grad.to(seen.dtype)

    @torch.no_grad()
    def to_model(self) -> None:
        for own, seen in zip(self.model, self.seen, strict=True):
            if own is not seen:
                own.copy_(seen)


def train(
    experiment: dict[str, Any],
    variant: dict[str, Any],
    lr: float,
    seed: int,
    data: dict[str, Tensor],
    watch: Callable[[int, torch.optim.Optimizer, list[nn.Parameter]], None] | None = None,
) -> dict[str, Any]:
    """One run; returns its figures. `watch(step, optimizer, matrices)` is called after each update."""
    torch.manual_seed(seed)
    length, size, steps = (experiment[key] for key in ("sequence_length", "batch_size", "steps"))
    config = LlamaConfig(
        vocab_size=experiment["vocab_size"],
        max_position_embeddings=length,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_cache=False,
        **experiment["model"],
    )
    model = LlamaForCausalLM(config)
    matrices, dense = split_parameters(model)
    weights = Weights(matrices, getattr(torch, variant["weights"]) if "weights" in variant else None)
    rank, gap = (variant.get(key, experiment[key]) for key in ("rank", "update_proj_gap"))
    optimizer = build(variant["optimizer"], weights.seen, lr, rank, gap, **variant.get("settings", {}))
    others = torch.optim.AdamW(dense, lr=experiment["dense_lr"], weight_decay=0.0, fused=True)

    def schedule(step: int) -> float:
        warmup = experiment["warmup_steps"]
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, schedule) for one in (optimizer, others)]
    train_data, valid_data = blocks(data["train"], length), blocks(data["valid"], length)[:128]
    order = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(seed))
    if steps * size > len(order):
        raise ValueError(f"{steps} steps of {size} sequences need more than the {len(order)} there are.")
    history, seconds, start = [], 0.0, time.perf_counter()
    for step in tqdm(range(steps), disable=None, leave=False):
        batch = train_data[order[step * size : (step + 1) * size]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        weights.to_optimizer()
        begin = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - begin
        others.step()
        weights.to_model()
        if watch is not None:
            watch(step, optimizer, weights.seen)
        for p in [*model.parameters(), *weights.seen]:
            p.grad = None
        for scheduler in schedulers:
            scheduler.step()
        if (step + 1) % experiment["evaluate_every"] == 0 or step + 1 == steps:
            history.append({"step": step + 1, "perplexity": perplexity(model, valid_data, size)})
        if not math.isfinite(loss.item()):
            break
    return {
        "perplexity": history[-1]["perplexity"] if history and math.isfinite(loss.item()) else None,
        "history": history,
        "tokens": steps * size * length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer_seconds": seconds,
        "seconds": time.perf_counter() - start,
        "state_bytes": measure.state_bytes(optimizer),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with train.txt and valid.txt")
    parser.add_argument("--variants", type=lambda text: text.split(","), help="default: all")
    parser.add_argument(
        "--learning_rates", type=lambda text: [float(lr) for lr in text.split(",")], help="default: all"
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    options = parser.parse_args(words)
    experiment = yaml.safe_load(options.experiment.read_text(encoding="utf-8"))
    variants = experiment.pop("variants")
    experiment.pop("published", None)  # a shorthand within the file
    names = options.variants or list(variants)
    for name in names:
        if name not in variants:
            parser.error(f"there is no variant {name!r}; there are {', '.join(variants)}")
    data = load_tokens(options.data_dir, options.output_dir / "data", experiment["vocab_size"])
    # The first learning rate of every variant comes before the second of any: the table is of use early.
    runs = [(n, name, lr) for name in names for n, lr in enumerate(variants[name]["learning_rates"])]
    for lr in options.learning_rates or []:
        if lr not in {run[2] for run in runs}:
            parser.error(f"no chosen variant of {options.experiment} has the learning rate {lr:g}: add it there")
    runs = [run for run in runs if options.learning_rates is None or run[2] in options.learning_rates]
    for _, name, lr in sorted(runs, key=lambda run: run[0]):
        for seed in options.seeds:
            path = options.output_dir / f"{name}-lr{lr:g}-seed{seed}.json"
            if path.is_file():
                continue
            print(path.stem, end=" ", flush=True)
            found = train(experiment, variants[name], lr, seed, data)
            about = {"variant": name, "lr": lr, "seed": seed, **variants[name], "experiment": experiment}
            command = ["python", "-m", "recipes.benchmarks.quality", *(words or sys.argv[1:])]
            files.write_json(path, about | found | {"provenance": measure.provenance(seed, command)})
            print(f"perplexity {found['perplexity'] or math.nan:.1f} in {found['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
