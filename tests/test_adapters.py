"""Models under PEFT: which matrices of an adapter are projected, be they linear layers or bare parameters."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from conftest import build_llama, build_tokens, trainer_groups
from fira_hf import FiraConfig, get_fira_optimizer
from fira_hf.targets import find_targets

TARGETS = ["q_proj", "up_proj"]
# Name of PEFT's config, its settings, the adapter's matrices, and what else it trains.
ADAPTERS = [
    ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 100}, {"lora_A", "lora_B"}, {"lora_E"}),
    ("LoHaConfig", {"r": 4}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set()),
    ("LoKrConfig", {"r": 2}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, set()),
    ("LoKrConfig", {"r": 2, "decompose_both": True}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, set()),
    ("HRAConfig", {"r": 4}, {"hra_u"}, set()),
    ("MissConfig", {"r": 4}, {"miss_block"}, set()),
    ("RandLoraConfig", {"r": 4}, {"randlora_lambda", "randlora_gamma"}, set()),
    ("DeloraConfig", {"r": 4}, {"delora_A", "delora_B"}, {"delora_lambda"}),
    ("OSFConfig", {}, {"U_low", "V_low"}, {"S_low"}),
    ("LoraConfig", {"r": 4, "use_dora": True}, {"lora_A", "lora_B"}, {"lora_magnitude_vector"}),
]


def adapted(name: str, **settings) -> nn.Module:
    if not hasattr(peft, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    model = build_llama(num_hidden_layers=1)
    return get_peft_model(model, getattr(peft, name)(**({"target_modules": TARGETS} | settings)))


def trained_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parts_of(names, parts) -> set[str]:
    return {part for part in parts for name in names if f".{part}" in name}


@pytest.mark.parametrize(("name", "settings", "matrices", "others"), ADAPTERS, ids=[case[0] for case in ADAPTERS])
def test_all_linear_finds_the_matrices_of_any_adapter(name, settings, matrices, others):
    model = adapted(name, **settings)
    trained = trained_by_name(model)
    plan = find_targets(model, FiraConfig(rank=2))
    projected, skipped = {t.name for t in plan.projected}, {s.name: s.reason for s in plan.skipped}
    assert projected | skipped.keys() == trained.keys()
    assert parts_of(projected, matrices | others) == matrices
    assert parts_of(skipped, matrices | others) == others
    assert all("vector" in reason for reason in skipped.values())

    # And they train: each has a basis after some steps, and has moved.
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = get_fira_optimizer(model, FiraConfig(rank=2, lr=1e-2))
    tokens = torch.stack([row["input_ids"] for row in build_tokens(4)])
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key in projected:
        assert optimizer.state[trained[key]]["basis"].shape[-1] == 2
        assert not torch.equal(trained[key], before[key]), key


def test_what_adapts_an_embedding_or_the_head_stays_dense():
    """As the layers themselves: A of an embedding is a table with a column for each token."""
    targets = ["embed_tokens", "q_proj", "lm_head"]
    for model in (adapted("LoraConfig", r=4, target_modules=targets), adapted("LoKrConfig", r=2)):
        plan = find_targets(model, FiraConfig(rank=2))
        assert plan.projected and all("q_proj" in t.name or "up_proj" in t.name for t in plan.projected)
    model = adapted("LoraConfig", r=4, target_modules=targets)
    reasons = {s.name: s.reason for s in find_targets(model, FiraConfig(rank=2)).skipped}
    assert {reason for name, reason in reasons.items() if "embed_tokens" in name} == {"embedding"}
    assert {reason for name, reason in reasons.items() if "lm_head" in name} == {"output head"}
    assert len(reasons) == 4


def test_stacks_of_an_adapter_are_reported_and_can_be_named():
    model = adapted("GraloraConfig", r=8)
    wrong = r"no trainable linear layer: matrices such as .*gralora_A.* are trained: name them in target_parameters"
    with pytest.raises(ValueError, match=wrong):
        find_targets(model, FiraConfig(rank=2))
    model.get_base_model().model.layers[0].mlp.down_proj.requires_grad_(True)
    wrong = r"target_modules: 'q_proj' matches only frozen weights, but parameters such as .*q_proj.gralora_A.default"
    with pytest.raises(ValueError, match=wrong):
        find_targets(model, FiraConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    config = FiraConfig(rank=2, target_modules=[], target_parameters=["gralora_A.default"])
    plan = find_targets(model, config)
    assert [t.matrices for t in plan.projected] == [2, 2] and all("gralora_A" in t.name for t in plan.projected)
    assert {s.reason for s in plan.skipped} == {"stack of an adapter", "not in target_modules"}


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("VeraConfig", {"r": 4}, "vera_lambda"),  # its A and B are shared and frozen
        ("IA3Config", {"feedforward_modules": ["up_proj"]}, "ia3_l"),
        ("FourierFTConfig", {"n_frequency": 8}, "fourierft_spectrum"),
    ],
)
def test_adapters_without_a_matrix_say_what_they_have(name, settings, part):
    model = adapted(name, **settings)
    with pytest.raises(ValueError, match=rf"no trainable linear layer: what is trained \(.*{part}.*AdamW"):
        find_targets(model, FiraConfig(rank=2))
    model.get_base_model().model.layers[0].mlp.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match="q_proj' matches only frozen weights"):
        find_targets(model, FiraConfig(rank=2, target_modules=["q_proj"]))


def test_a_prompt_that_is_trained_alone_is_sent_to_target_parameters():
    model = get_peft_model(
        build_llama(num_hidden_layers=1), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(
        ValueError, match="matrices such as prompt_encoder.default.embedding.weight .*target_parameters"
    ):
        find_targets(model, FiraConfig())
    config = FiraConfig(target_modules=[], target_parameters=["prompt_encoder.default.embedding.weight"])
    assert len(find_targets(model, config).projected) == 1


# --------------------------------------------------------------------------- names


def build_lora(**settings):
    return get_peft_model(build_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))


def build_adalora():
    return get_peft_model(build_llama(), AdaLoraConfig(init_r=4, total_step=100, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("build", [build_lora, build_adalora])
@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("all-linear", ("lora_A", "lora_B")),
        (["q_proj"], ("q_proj.lora_A", "q_proj.lora_B")),
        (["lora_A"], ("lora_A",)),
        (["v_proj.lora_A.default"], ("v_proj.lora_A",)),
        (["q_proj", "lora_B"], ("q_proj.lora_A", "lora_B")),
        (r".*v_proj", ("v_proj.lora_A", "v_proj.lora_B")),
    ],
    ids=str,
)
def test_under_a_peft_model_the_adapter_matrices_are_chosen(build, targets, parts):
    model = build()
    chosen = {id(entry.parameter) for entry in find_targets(model, FiraConfig(target_modules=targets)).projected}
    expected = {
        name for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)
    }
    assert {name for name, p in model.named_parameters() if id(p) in chosen} == expected


BOTH = ("lora_A", "lora_B")


@pytest.mark.parametrize("build", [build_lora, build_adalora])
@pytest.mark.parametrize(
    ("targets", "parts"),
    [(None, BOTH), (["q_proj"], ("q_proj.lora_A", "q_proj.lora_B")), (["lora_A"], ("lora_A",)), (["attn"], BOTH)],
    ids=str,
)
def test_under_a_peft_model_in_the_trainer(build, targets, parts, tmp_path):
    model = build()
    groups = trainer_groups(model, "fira", targets, tmp_path)
    chosen = {id(p) for group in groups if "rank" in group for p in group["params"]}
    expected = {
        name for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)
    }
    assert {name for name, p in model.named_parameters() if id(p) in chosen} == expected


def test_a_trainable_copy_of_the_head_stays_dense():
    model = build_lora(modules_to_save=["lm_head"])
    plan = find_targets(model, FiraConfig())
    head = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    assert len(head) == 1
    assert all(entry.parameter is not head[0] for entry in plan.projected)
    assert any(entry.parameter is head[0] and entry.reason for entry in plan.skipped)


def test_patterns_find_an_adapter_without_layers_as_they_find_lora():
    config = FiraConfig(rank=4, rank_pattern={"q_proj": 2, "lora_B": 3})
    plans = [find_targets(build(), config).projected for build in (build_lora, build_adalora)]
    ranks = [{target.name.removesuffix(".weight"): target.rank for target in plan} for plan in plans]
    assert ranks[0] == ranks[1] and set(ranks[0].values()) == {2, 3, 4}
