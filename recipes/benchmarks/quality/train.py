"""One training run: a small LLaMA on the bytes of a text, its matrices by one method, the rest by AdamW for all."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fira_hf import int8
from recipes import measure
from recipes.benchmarks.models import Size
from recipes.benchmarks.optimizers import build
from recipes.pretraining.data import read

# A rank of a quarter of the width, unless a method says otherwise. With an untied head for 256 bytes, 92% of the
# 869,504 parameters of 1m are in the matrices that the methods train, and more in the larger ones.
SIZES = {
    "tiny": Size(32, 88, 2, 1, 8),  # to try the benchmark out
    "1m": Size(128, 352, 4, 4, 32),
    "3m": Size(256, 688, 4, 4, 64),
    "10m": Size(384, 1024, 6, 6, 96),
}
BYTES = 256  # the vocabulary
LENGTH = 256  # of a sequence
LINEAR = r".*\.(self_attn|mlp)\..*_proj"  # the layers of the matrices
DENSE_LR = 3e-3  # embeddings, norms and head
POINTS = 8  # evaluations of a run
VALID_BLOCKS = 256
INTERVAL = 40  # of bases and columns: the 200 steps of the peers' papers are half a run here

Watch = Callable[[int, torch.optim.Optimizer, list[nn.Parameter]], None]


@dataclass(frozen=True, order=True)
class Regime:
    """What all methods share: the model, the bytes of a step, and the steps."""

    size: str
    batch: int
    steps: int

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}; there are {', '.join(SIZES)}.")
        if self.batch < LENGTH or self.batch % LENGTH:
            raise ValueError(f"batch is {self.batch} bytes; give a multiple of {LENGTH}, the length of a sequence.")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; a run takes at least one.")

    def __str__(self) -> str:
        return f"{self.size}-b{self.batch}-s{self.steps}"


@dataclass(frozen=True)
class Data:
    """Blocks of bytes (blocks, LENGTH) to train on and to validate with; `name` and `digest` say of what text.

    Arrays, which go to other processes by value: tensors would need shared memory.
    """

    name: str
    digest: str
    train: np.ndarray
    valid: np.ndarray


def load(folder: str) -> Data:
    """Of validation a fixed set of blocks, spread evenly over the text.

    Raises:
        FileNotFoundError: the folder has no train.txt or valid.txt.
        ValueError: a text is shorter than one block.
    """
    texts = {split: "\n".join(read(folder, split)).encode() for split in ("train", "valid")}
    found = {}
    for split, text in texts.items():
        if len(text) < LENGTH:
            raise ValueError(f"The {split} text of {folder} has {len(text)} bytes, less than one block of {LENGTH}.")
        found[split] = np.frombuffer(text[: len(text) // LENGTH * LENGTH], dtype=np.uint8).reshape(-1, LENGTH)
    number = len(found["valid"])
    chosen = np.linspace(0, number - 1, min(number, VALID_BLOCKS)).round().astype(int)
    digest = hashlib.sha256(texts["train"] + b"\0" + texts["valid"]).hexdigest()[:12]
    return Data(Path(folder).name, digest, found["train"], found["valid"][chosen])


def batches(data: np.ndarray, sequences: int, seed: int) -> Iterator[Tensor]:
    """Without end: the blocks in an order that the seed chooses, and in another one each time they are through."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < sequences:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        yield torch.from_numpy(data[order[:sequences].numpy()]).long()
        order = order[sequences:]


def build_model(size: Size) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTES,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of attention and MLP, as in the published pre-training, and the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ("attn" in name or "mlp" in name)]
    chosen = set(matrices)
    return matrices, [p for p in model.parameters() if p not in chosen]


def add_adapters(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """LoRA from scratch: W0 + 2 B A, of which B and A, begun as PEFT does, are trained in place of the matrices."""
    _, dense = split_parameters(model)
    get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))
    for p in dense:  # PEFT has frozen them
        p.requires_grad_(True)
    return [p for name, p in model.named_parameters() if "lora_" in name]


class Widened(nn.Module):
    """Of a weight in half precision a copy in fp32, in which all else is computed."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


def store_in(model: nn.Module, kept: str) -> None:
    """Keeps the matrices in bf16, or as torchao's int8 with scales in bf16; gradients are bf16, all else is fp32."""
    for name, module in model.named_modules():
        if not re.fullmatch(LINEAR, name):
            continue
        module.weight.data = module.weight.data.bfloat16()
        if kept == "bfloat16":
            nn.utils.parametrize.register_parametrization(module, "weight", Widened(), unsafe=True)
        else:
            int8.quantise(module)


@torch.no_grad()
def validate(model: nn.Module, valid: Tensor) -> float:
    """Nats a byte."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in valid.split(32)]
    model.train()
    return sum(losses) / len(valid)


class Loss(nn.Module):
    """The model with one tensor in and one out, as a CUDA graph wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss


def graphed(model: nn.Module, batch: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's loss, forward and backward each as one CUDA graph: started kernel by kernel, models of this size
    leave a GPU idle for most of a step.
    """
    return torch.cuda.make_graphed_callables(Loss(model), (torch.zeros_like(batch),))


def schedule(step: int, steps: int) -> float:
    """Of the peak: a warm-up over a tenth of the steps, then a cosine to a tenth."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def rank_of(method: dict[str, Any], size: Size) -> int:
    """The method's own `rank`, its `share` of the width, or a quarter of it."""
    return method.get("rank") or max(1, round(method.get("share", size.rank / size.hidden) * size.hidden))


def train(
    method: dict[str, Any],
    lr: float,
    regime: Regime,
    seed: int,
    data: Data,
    watch: Watch | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The figures of one run; `loss` is None if it diverged. Weights and batches are those of the seed on any device.

    `watch(step, optimizer, matrices)` is called after each update, `progress(steps done, training loss)` as well.
    """
    torch.manual_seed(seed)
    size, steps = SIZES[regime.size], regime.steps
    model = build_model(size).to(device)
    if "weights" in method:
        store_in(model, method["weights"])
    matrices, dense = split_parameters(model)
    elements, parameters = sum(p.numel() for p in matrices), sum(p.numel() for p in model.parameters())
    rank = rank_of(method, size)
    if method.get("lora"):
        matrices = add_adapters(model, rank)
    optimizer = build(
        method["optimizer"], matrices, lr, rank, method.get("interval", INTERVAL), **method.get("settings", {})
    )
    others = torch.optim.AdamW(dense, lr=DENSE_LR, weight_decay=0.0, fused=True)
    optimizers = (optimizer, others)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: schedule(step, steps)) for one in optimizers]
    evaluate_after = {math.ceil(steps * point / POINTS) for point in range(1, POINTS + 1)}
    valid = torch.from_numpy(data.valid).long().to(device)
    loss_of: Callable[[Tensor], Tensor] = Loss(model)
    if valid.is_cuda:
        loss_of = graphed(model, valid.new_zeros(regime.batch // LENGTH, LENGTH))
    history, start, diverged = [], time.perf_counter(), False
    for step, batch in zip(range(steps), batches(data.train, regime.batch // LENGTH, seed), strict=False):
        loss = loss_of(batch.to(device))
        if not math.isfinite(loss.item()):
            diverged = True
            break
        loss.backward()
        try:
            for one in optimizers:
                one.step()
        except torch.linalg.LinAlgError:  # the SVD of a gradient that is no longer finite
            diverged = True
            break
        if watch is not None:
            watch(step, optimizer, matrices)
        for p in model.parameters():
            p.grad = None
        for scheduler in schedulers:
            scheduler.step()
        progress(step + 1, loss.item())
        if step + 1 in evaluate_after:
            history.append({"step": step + 1, "loss": validate(model, valid)})
            if not math.isfinite(history[-1]["loss"]):
                history.pop()
                diverged = True
                break
    state_bytes = measure.state_bytes(optimizer)
    return {
        "status": "diverged" if diverged else "ok",
        "loss": None if diverged else history[-1]["loss"],
        "history": history,
        "tokens": steps * regime.batch,
        "parameters": parameters,
        "rank": rank,
        "state_bytes": state_bytes,
        "bytes_a_weight": state_bytes / elements,
        "seconds": time.perf_counter() - start,
    }
