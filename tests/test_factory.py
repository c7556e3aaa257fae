"""get_fira_optimizer: parameter groups, the summary, and bytes that are predicted before they are held."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from conftest import build_llama, build_mixtral, build_tokens
from fira_hf import FiraAdamW, FiraConfig, fira_adamw, get_fira_optimizer
from fira_hf.factory import build_optimizer
from fira_hf.memory import estimate_memory
from fira_hf.targets import find_targets


def build_gpt2(dtype=torch.float32):
    """Biases, LayerNorms, Conv1D and a head tied to the embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).to(dtype)


def build_lora(dtype=torch.float32):
    return get_peft_model(build_llama(dtype=dtype), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def build_partly_frozen(dtype=torch.float32):
    model = build_llama(dtype=dtype)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


MODELS = {
    "llama": build_llama,
    "gpt2": build_gpt2,
    "mixtral": build_mixtral,
    "lora": build_lora,
    "partly frozen": build_partly_frozen,
}
PATTERNS = {"rank": 8, "rank_pattern": {r".*\.1\..*": 4}, "alpha_pattern": {"q_proj|c_attn": 0.5}}


def one_step(model, optimizer):
    tokens = torch.stack([row["input_ids"] for row in build_tokens(4)])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def bytes_held(optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(tensor.nbytes for tensor in tensors)


# --------------------------------------------------------------------------- groups


@pytest.mark.parametrize("settings", [{"rank": 8}, PATTERNS, {"rank": 8, "dense_lr": 1e-4}], ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(build, settings):
    model = build()
    groups = get_fira_optimizer(model, FiraConfig(**settings)).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_projected_groups_hold_the_plan_and_come_first(build):
    model = build()
    config = FiraConfig(**PATTERNS)
    groups = get_fira_optimizer(model, config).param_groups
    plan = {id(e.parameter): (min(e.rank, *e.parameter.shape), e.alpha) for e in find_targets(model, config).projected}
    held = {
        id(p): (min(group["rank"], *p.shape), group["alpha"])
        for group in groups
        if "rank" in group
        for p in group["params"]
    }
    assert held == plan
    is_projected = ["rank" in group for group in groups if group["params"]]
    assert is_projected == sorted(is_projected, reverse=True)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_weight_decay_excludes_what_the_trainer_excludes(build):
    model = build()
    decays = set(Trainer.get_decay_parameter_names(None, model))
    groups = get_fira_optimizer(model, FiraConfig(rank=8, weight_decay=0.1)).param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {id(p): 0.1 if name in decays else 0.0 for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected


def test_the_names_of_norms_are_recognised_as_the_trainer_recognises_them():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.InputLayerNorm, self.ln_norm, self.norm, self.normal, self.Bias = (Scale() for _ in range(5))
            self.block = nn.ModuleDict({"RMSNorm": Scale(), "scale": Scale(), "ln": nn.LayerNorm(4)})
            self.bias_scale = nn.Parameter(torch.ones(4))

    model = Model()
    decays = set(Trainer.get_decay_parameter_names(None, model))
    groups = get_fira_optimizer(model, FiraConfig(rank=2, weight_decay=0.1)).param_groups
    found = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in found} == decays
    assert {"proj.weight", "normal.weight", "block.scale.weight"} <= decays


@pytest.mark.parametrize("dense_lr", [None, 1e-5, 0.0], ids=str)
def test_dense_lr_is_for_what_is_not_projected(dense_lr):
    optimizer = get_fira_optimizer(build_llama(), FiraConfig(rank=8, lr=1e-2, dense_lr=dense_lr))
    for group in optimizer.param_groups:
        dense = 1e-2 if dense_lr is None else dense_lr
        assert group["lr"] == (1e-2 if "rank" in group else dense)


def test_the_settings_reach_every_group():
    config = FiraConfig(
        rank=8,
        alpha=0.5,
        update_proj_gap=7,
        gamma=None,
        scaling="matrix",
        residual="paper",
        projection="random",
        betas=(0.8, 0.95),
        eps=1e-5,
    )
    optimizer = get_fira_optimizer(build_llama(), config)
    assert isinstance(optimizer, FiraAdamW)
    assert optimizer.config == config
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-5)
        if "rank" in group:
            own = {
                key: group[key] for key in ("alpha", "update_proj_gap", "gamma", "scaling", "residual", "projection")
            }
            assert own == {
                "alpha": 0.5,
                "update_proj_gap": 7,
                "gamma": None,
                "scaling": "matrix",
                "residual": "paper",
                "projection": "random",
            }


def test_the_config_is_not_changed_by_use():
    config = FiraConfig(rank=8, target_modules=["q_proj"], rank_pattern={"q_proj": 4})
    before = config.to_dict()
    get_fira_optimizer(build_llama(), config)
    assert config.to_dict() == before


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{"rank": 8}, PATTERNS, {"rank": 500}], ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_estimate_is_what_fira_holds(build, settings, dtype):
    model = build(dtype=dtype)
    config = FiraConfig(**settings)
    estimate = estimate_memory(model, config)
    assert estimate.weights == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    optimizer = get_fira_optimizer(model, config)
    for _ in range(2):  # LoRA's A receives its first gradient in the second step, B being zero at first
        one_step(model, optimizer)
    assert estimate.optimizer_state == bytes_held(optimizer)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(build_gpt2, {"c_attn": 3, "c_fc": 2}), (build_mixtral, {"gate_up_proj": 2}), (build_mixtral, {"q_proj": 4})],
    ids=["gpt2", "experts", "mixtral's attention"],
)
@pytest.mark.parametrize("rank", [4, 500])
def test_the_estimate_of_fused_weights_is_what_fira_holds(build, pattern, state_dtype, rank):
    model = build()
    config = FiraConfig(rank=rank, split_pattern=pattern, state_dtype=state_dtype)
    optimizer = get_fira_optimizer(model, config)
    one_step(model, optimizer)
    assert estimate_memory(model, config).optimizer_state == bytes_held(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_estimate_is_what_adamw_holds(build, dtype):
    model = build(dtype=dtype)
    estimate = estimate_memory(model, None)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    one_step(model, optimizer)
    assert estimate.optimizer_state == bytes_held(optimizer)


@pytest.mark.parametrize("config", [None, FiraConfig(rank=8)], ids=["adamw", "fira"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_meta_device_gives_the_same_estimate(config, tied):
    with torch.device("meta"):
        on_meta = build_llama(tie_word_embeddings=tied)
    on_meta.tie_weights()
    assert estimate_memory(on_meta, config) == estimate_memory(build_llama(tie_word_embeddings=tied), config)


def test_a_large_model_is_estimated_without_its_weights():
    with torch.device("meta"):
        model = build_llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
    plan = find_targets(model, FiraConfig(rank=128)).projected
    low_rank = sum(4 * 128 * (min(e.parameter.shape) + 2 * max(e.parameter.shape)) for e in plan)
    fira, adamw = (estimate_memory(model, config).optimizer_state for config in (FiraConfig(rank=128), None))
    assert low_rank < fira < adamw


# --------------------------------------------------------------------------- the summary


def numbers_in(text: str) -> set[int]:
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?![\d.])", text)}


def test_the_summary_counts_what_is_projected_and_what_is_not():
    model = build_partly_frozen()
    config = FiraConfig(rank=8, rank_pattern={"q_proj": 4})
    summary = get_fira_optimizer(model, config).summary
    plan = find_targets(model, config)
    projected = [entry.parameter for entry in plan.projected]
    assert len(summary.splitlines()) > 1
    numbers = numbers_in(summary)
    assert len(projected) in numbers
    assert sum(p.numel() for p in projected) in numbers
    assert {4, 8} <= numbers, "both ranks"
    skipped_trainable = [entry for entry in plan.skipped if entry.parameter.requires_grad]
    for reason in {entry.reason for entry in skipped_trainable}:
        assert reason in summary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_summary_says_that_half_precision_loses_updates(dtype):
    """transformers 5 loads weights in the dtype of their checkpoint, so nobody has to have chosen it."""
    model = build_llama().to(dtype)
    size = f"{sum(p.numel() for p in model.parameters()):,} of the trainable parameters are in half precision"
    assert size in get_fira_optimizer(model, FiraConfig(rank=8)).summary
    assert "half" not in get_fira_optimizer(model.float(), FiraConfig(rank=8)).summary
    rounded = FiraConfig(rank=8, stochastic_rounding=True)
    assert "half" not in get_fira_optimizer(model.bfloat16(), rounded).summary


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        (lambda model: (model.parameters(), FiraConfig()), "not a generator: .* take fira_adamw"),
        (lambda model: (model, {"rank": 8}), r"no FiraConfig: write get_fira_optimizer\(model, FiraConfig"),
    ],
)
def test_what_is_no_model_or_no_config_is_an_error_with_a_way_out(given, way_out):
    with pytest.raises(TypeError, match=way_out):
        get_fira_optimizer(*given(build_llama()))


def test_a_state_that_saves_nothing_is_a_warning(caplog):
    """As that of LoRA's matrices at the default rank: the summary, which says so too, is logged as information."""
    get_fira_optimizer(build_llama(), FiraConfig(rank=2))
    assert "optimizer state" not in caplog.text
    optimizer = get_fira_optimizer(build_llama(), FiraConfig(rank=1000))
    assert "and AdamW's would take" in caplog.text and "lower the rank" in caplog.text
    assert "Optimizer state" in optimizer.summary


def test_the_summary_counts_matrices_and_the_weights_that_hold_them():
    """8 of attention, 4 experts in each of 4 stacks; those of gate_up_proj in two parts, too wide a rank for them."""
    config = FiraConfig(rank=8, rank_pattern={"gate_up_proj": 32}, split_pattern={"gate_up_proj": 2})
    summary = get_fira_optimizer(build_mixtral(), config).summary.splitlines()
    assert summary[0].startswith(
        "Fira projects 32 matrices in 12 weights (16 at rank 32, 16 at rank 8) with 36,864 of "
    )
    assert summary[1].startswith("16 of them need at least as much state")
    summary = get_fira_optimizer(build_llama(), FiraConfig(rank=8)).summary
    assert summary.startswith("Fira projects 14 matrices (14 at rank 8) ")


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_summary_states_the_bytes_of_fira_beside_those_of_adamw(build):
    model = build()
    config = FiraConfig(rank=8)
    optimizer = get_fira_optimizer(model, config)
    summary = optimizer.summary
    for _ in range(2):
        one_step(model, optimizer)
    numbers = numbers_in(summary)
    assert bytes_held(optimizer) in numbers
    assert estimate_memory(model, None).optimizer_state in numbers


def test_the_first_step_moves_every_trainable_weight():
    model = build_gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model, get_fira_optimizer(model, FiraConfig(rank=8)))
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_a_model_that_has_nothing_to_project_is_an_error():
    with pytest.raises(ValueError, match="(?i)linear"):
        get_fira_optimizer(nn.LayerNorm(4), FiraConfig())


def test_parameters_without_their_model_train_as_with_it():
    """As sd-scripts and musubi-tuner make an optimizer: groups with the values of a dict and a rate, and keywords."""
    tokens = torch.arange(16).view(2, 8)
    trained = []
    for by_name in (True, False):
        model = build_lora()
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if by_name:
            optimizer = fira_adamw([{"params": weights.values(), "lr": 1e-2}], lr=1.0, rank=2, update_proj_gap=2)
        else:
            optimizer = get_fira_optimizer(model, FiraConfig(rank=2, update_proj_gap=2, lr=1e-2))
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(weights)
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())


def test_of_parameters_without_a_model_matrices_are_projected():
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((8, 6), (4, 3, 3, 3), (5,), (7, 1))]
    optimizer = fira_adamw(weights, lr=1e-3, rank=2)
    assert [(group.get("rank"), len(group["params"])) for group in optimizer.param_groups] == [(2, 1), (None, 3)]
    for form in (enumerate(weights), [{"params": weights[0]}, {"params": weights[1:]}]):
        given = [(f"weight {i}", p) for i, p in form] if isinstance(form, enumerate) else form
        optimizer = fira_adamw(given, rank=2)
        assert [(group.get("rank"), len(group["params"])) for group in optimizer.param_groups] == [(2, 1), (None, 3)]
    assert fira_adamw(weights, preset="muon-4bit", gamma=3.0).param_groups[0]["rank"] == 6
    for unknown, word in (
        ({"rnk": 2}, "rnk"),
        ({"target_modules": ["0"]}, "target_modules"),
        ({"preset": "moun"}, "moun"),
    ):
        with pytest.raises(ValueError, match=f"fira_adamw: Unknown .*'{word}'"):
            fira_adamw(weights, **unknown)
    with pytest.raises(ValueError, match="no matrix that is trained, but 3 others"):
        fira_adamw(weights[1:], rank=2)
    with pytest.raises(ValueError, match="nn.Parameter"):
        fira_adamw([torch.ones(8, 6, requires_grad=True)], rank=2)


def test_the_summary_is_of_what_the_optimizer_was_given():
    """Groups of one's own over a part of the model, one of them a tensor by itself, as torch takes them."""
    model = build_llama()
    chosen = model.model.layers[0].mlp.up_proj.weight
    optimizer = build_optimizer(model, FiraConfig(rank=4), [{"params": chosen}, {"params": [model.lm_head.weight]}])
    assert optimizer.summary.startswith(f"Fira projects 1 matrices (1 at rank 4) with {chosen.numel():,} of ")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
