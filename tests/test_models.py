"""The families that train: tiny random models, one short epoch each with the Trainer, optim="fira" and its default
target "all-linear". What is projected, and what is not and why, is written out for each of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from conftest import needs_stacked_experts, trainer_settings
from fira_hf import FiraConfig
from fira_hf.callbacks import state_bytes
from fira_hf.memory import estimate_memory

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = SIZE | {"num_key_value_heads": 2, "intermediate_size": 40, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}
IMAGE = {key: value for key, value in SIZE.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
VECTORS = "vector: bias, norm"


def text(rows=32, length=10):
    """Sequences that count up, by 1 or 3."""
    starts = torch.arange(rows)
    tokens = [(start + (1 + 2 * (start % 2)) * torch.arange(length)) % 60 + 3 for start in starts]
    return [{"input_ids": row, "labels": row} for row in tokens]


def images(rows=32):
    """Pictures of which one third is bright, the label says which."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(rows):
        pixels = 0.1 * torch.randn(3, 8, 8, generator=generator)
        pixels[i % 3] += 1.0
        found.append({"pixel_values": pixels, "labels": torch.tensor(i % 3)})
    return found


@dataclass
class Family:
    """model, config: classes. matrices: projected, in `weights` weights. others: reason -> weights not projected."""

    model: type
    config: object
    matrices: int
    weights: int
    others: dict[str, int]
    experts: list[str] = field(default_factory=list)
    data: list = field(default_factory=text)

    def build(self) -> nn.Module:
        if self.experts:
            needs_stacked_experts()
        torch.manual_seed(0)
        return self.model(self.config)


EXPERTS = ["mlp.experts.gate_up_proj", "experts.down_proj"]
# Two layers of four attention matrices and, in the mixtures, two stacks of experts (4, or 5 of Qwen's).
FAMILIES = {
    "mixtral": Family(
        MixtralForCausalLM,
        MixtralConfig(**MIXTURE, num_local_experts=4),
        matrices=2 * (4 + 2 * 4),
        weights=12,
        others={"embedding": 1, "output head": 1, VECTORS: 5, "not a linear layer (MixtralTopKRouter)": 2},
        experts=EXPERTS,
    ),
    "qwen3_moe": Family(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**MIXTURE, num_experts=5, moe_intermediate_size=24, head_dim=8),
        matrices=2 * (4 + 2 * 5),
        weights=12,
        others={"embedding": 1, "output head": 1, VECTORS: 9, "not a linear layer (Qwen3MoeTopKRouter)": 2},
        experts=EXPERTS,
    ),
    "gpt_oss": Family(
        GptOssForCausalLM,
        # down_proj is square and stored (in, out), as in the published models
        GptOssConfig(**MIXTURE | {"intermediate_size": 32}, **TOKENS, num_local_experts=4, head_dim=8),
        matrices=2 * (4 + 2 * 4),
        weights=12,
        others={"embedding": 1, "output head": 1, VECTORS: 21, "not a linear layer (GptOssTopKRouter)": 2},
        experts=EXPERTS,
    ),
    "gpt2": Family(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, **TOKENS),
        matrices=8,
        weights=8,
        others={"embedding, tied to the output head": 1, "embedding": 1, VECTORS: 18},
    ),
    "bert": Family(
        BertForMaskedLM,
        BertConfig(**SIZE, intermediate_size=80),
        matrices=13,  # six a layer, and the one before the tied head
        weights=13,
        others={"embedding, tied to the output head": 1, "embedding": 2, VECTORS: 26},
    ),
    "t5": Family(
        T5ForConditionalGeneration,
        T5Config(**T5, decoder_start_token_id=0),
        matrices=2 * (4 + 2) + 2 * (8 + 2),
        weights=32,
        others={"embedding, tied to the output head": 1, "embedding": 2, VECTORS: 12},
    ),
    "vit": Family(
        ViTForImageClassification,
        ViTConfig(**IMAGE, intermediate_size=80, num_labels=3),
        matrices=12,
        weights=12,
        others={
            "output head": 1,
            VECTORS: 24,
            "not a linear layer (ViTEmbeddings)": 2,
            "not a linear layer (Conv2d)": 1,
        },
        data=images(),
    ),
}
MIXTURES = [name for name, family in FAMILIES.items() if family.experts]


def train(family, tmp_path, **arguments):
    """One epoch of eight steps; returns the trainer and the names of the projected weights."""
    settings = {"optim": "fira", "optim_args": "rank=4, update_proj_gap=3", "max_steps": -1, "num_train_epochs": 1}
    settings |= {"per_device_train_batch_size": 4, "adam_beta2": 0.99, "weight_decay": 0.01, "logging_steps": 1}
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), **settings | arguments))
    model = family.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=args, train_dataset=family.data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    names = {p: name for name, p in model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    projected = {names[p] for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all()
        assert name not in projected or not torch.equal(p, before[name]), name
    return trainer, optimizer, projected


def reasons(summary: str) -> dict[str, int]:
    """Reason -> number of weights that are not projected for it."""
    (line,) = [line for line in summary.splitlines() if line.startswith("Not projected")]
    listed = re.search(r"trained by AdamW \((.*)\)\.$", line)[1]
    found = (re.fullmatch(r"(.*): [\d,]+ in (\d+)", part) for part in listed.split("; "))
    return {entry[1]: int(entry[2]) for entry in found}


def named(summary: str) -> tuple[int, int]:
    """The matrices that the summary says are projected, and the weights that hold them."""
    found = re.match(r"Fira projects (\d+) matrices (?:in (\d+) weights )?\(", summary)
    return int(found[1]), int(found[2] or found[1])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_family_trains_with_all_linear(family, tmp_path):
    trainer, optimizer, projected = train(family, tmp_path)
    assert len(projected) == family.weights
    assert named(optimizer.summary) == (family.matrices, family.weights)
    assert reasons(optimizer.summary) == family.others
    assert estimate_memory(trainer.model, optimizer.config).optimizer_state >= state_bytes(optimizer)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_its_own_basis(name, tmp_path):
    """Ordinary training of a mixture: an expert that had tokens has a basis and its own count of updates."""
    trainer, optimizer, projected = train(FAMILIES[name], tmp_path)
    for parameter, p in trainer.model.named_parameters():
        if ".experts." in parameter and not parameter.endswith("bias"):
            state = optimizer.state[p]
            assert parameter in projected
            assert state["basis"].shape[:1] == state["step"].shape == p.shape[:1]
            for expert in range(len(p)):
                Q, steps = state["basis"][expert], state["step"][expert].item()
                eye = torch.eye(Q.shape[1]) if steps else torch.zeros(Q.shape[1], Q.shape[1])
                torch.testing.assert_close(Q.t() @ Q, eye, rtol=0, atol=1e-4)
            assert state["step"].max() == 8


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_which_only_experts_are_projected(name, tmp_path):
    family = FAMILIES[name]
    path = FiraConfig(rank=4, target_modules=[], target_parameters=family.experts).save_pretrained(tmp_path)
    _, optimizer, projected = train(family, tmp_path, optim_args=f"config={path}")
    assert len(projected) == 4
    assert all(parameter.endswith(("experts.gate_up_proj", "experts.down_proj")) for parameter in projected)
    assert reasons(optimizer.summary)["not in target_modules"] == 9  # attention and head


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_which_experts_are_not_projected_says_how_to(name, tmp_path):
    _, optimizer, projected = train(FAMILIES[name], tmp_path, optim_target_modules=["self_attn"])
    assert len(projected) == 8
    assert reasons(optimizer.summary)["stacked experts, not in target_parameters"] == 4


@pytest.mark.parametrize(
    ("name", "pattern", "fused"),
    [
        ("gpt2", {"c_attn": 3}, "attn.c_attn.weight"),
        ("mixtral", {"gate_up_proj": 2}, "mlp.experts.gate_up_proj"),
        ("qwen3_moe", {"experts.gate_up_proj": 2}, "mlp.experts.gate_up_proj"),
    ],
)
def test_fused_projections_are_split(name, pattern, fused, tmp_path):
    family = FAMILIES[name]
    (parts,) = pattern.values()
    path = FiraConfig(rank=4, update_proj_gap=3, split_pattern=pattern).save_pretrained(tmp_path)
    trainer, optimizer, _ = train(family, tmp_path, optim_args=f"config={path}")
    weights = [p for parameter, p in trainer.model.named_parameters() if parameter.endswith(fused)]
    assert len(weights) == 2
    for p in weights:
        assert len(optimizer.state[p]["basis"]) == parts * (len(p) if p.ndim == 3 else 1)
    more = sum((parts - 1) * (len(p) if p.ndim == 3 else 1) for p in weights)
    assert named(optimizer.summary) == (family.matrices + more, family.weights)
