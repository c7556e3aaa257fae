"""What the errors of target matching say, and that what they advise works."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from conftest import build_llama, trainer_groups
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.callbacks import state_bytes
from fira_hf.layerwise import step_in_backward
from fira_hf.memory import estimate_memory
from fira_hf.targets import find_targets
from reference import weight


def projected(model: nn.Module, **settings) -> list[str]:
    return [target.name for target in find_targets(model, FiraConfig(rank=2, **settings)).projected]


# --------------------------------------------------------------------------- entries that choose nothing


@pytest.mark.parametrize("entry", [["mlp"], ["layers.0"], r"model\.layers\.0"], ids=str)
def test_a_container_to_exclude_is_named_with_what_excludes_its_layers(entry):
    """As ["vision_tower"], which would leave that part to Fira without a word."""
    model = build_llama()
    with pytest.raises(ValueError, match="which holds linear layers and is none") as refused:
        find_targets(model, FiraConfig(exclude_modules=entry))
    advised = eval(str(refused.value).rpartition("exclude_modules=")[2].rstrip("."))
    left, part = projected(model, exclude_modules=advised), "mlp" if entry == ["mlp"] else "layers.0"
    assert left and left == [name for name in projected(model) if f"{part}." not in name]
    assert projected(model, exclude_modules=["norm"]) == projected(model)  # holds none


@pytest.mark.parametrize(
    ("targets", "named", "near"),
    [
        (["q_porj"], "'q_porj'", "q_proj"),
        (["q_proj", "mlp.donw_proj"], "donw_proj", "down_proj"),
        (r".*\.q_porj", "q_porj", "q_proj"),
        (["model.layers.7.self_attn.q_proj"], "layers.7", "model.layers.1.self_attn.q_proj"),
    ],
    ids=str,
)
def test_an_unmatched_entry_is_named_with_real_names_nearby(targets, named, near):
    with pytest.raises(ValueError) as refused:
        find_targets(build_llama(), FiraConfig(target_modules=targets))
    message = str(refused.value)
    assert named in message
    assert near in message.replace(named, "")


@pytest.mark.parametrize("targets", [["q_porj"], ["q_proj", "donw_proj"], r".*q_porj"], ids=str)
def test_the_trainer_refuses_an_unmatched_entry_too(targets, tmp_path):
    with pytest.raises(ValueError, match="q_porj|donw_proj"):
        trainer_groups(build_llama(), "fira", targets, tmp_path)


def test_an_entry_that_finds_only_frozen_weights_says_so():
    model = build_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="(?s)'q_proj'.*frozen"):
        find_targets(model, FiraConfig(target_modules=["q_proj", "k_proj"]))


def test_a_wholly_frozen_model_says_so():
    model = build_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable linear layer|frozen"):
        find_targets(model, FiraConfig())


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm", "self_attn", "act_fn"])
def test_a_target_that_is_no_linear_layer_says_so(target):
    with pytest.raises(ValueError) as refused:
        find_targets(build_llama(), FiraConfig(target_modules=["q_proj", target]))
    assert repr(target) in str(refused.value)
    assert "linear" in str(refused.value).lower()


def test_a_model_without_linear_layers_says_so():
    model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="(?i)linear"):
        find_targets(model, FiraConfig())


def test_flattened_weights_are_refused():
    """As FSDP1 and DeepSpeed leave them in their layers."""
    model = build_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().flatten())
    with pytest.raises(ValueError, match=r"up_proj has a weight of shape \(2560,\).*Use DDP or fully_shard"):
        find_targets(model, FiraConfig())


def test_excluding_everything_is_an_error():
    with pytest.raises(ValueError, match="exclude_modules"):
        find_targets(build_llama(), FiraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))


def test_layers_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match="layers_to_transform"):
        find_targets(build_llama(), FiraConfig(target_modules=["q_proj"], layers_to_transform=[7]))


# --------------------------------------------------------------------------- parametrized layers

# How a layer is parametrized -> the matrix that is trained in place of its weight.
PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, "fc.parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "fc.parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "fc.parametrizations.weight.original"),
    "weight_norm of old": (old_weight_norm, "fc.weight_v"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(("parametrize", "matrix"), PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parametrized_layer_names_the_matrix_that_can_be_projected(parametrize, matrix, tmp_path):
    model = nn.ModuleDict({"fc": parametrize(nn.Linear(8, 8)), "other": nn.Linear(8, 4)})
    named = rf"target_modules: 'fc' matches no linear layer .*, but .* such as {matrix}, which target_parameters"
    for targets in (["fc"], "fc"):
        with pytest.raises(ValueError, match=rf"^{named} names"):
            find_targets(model, FiraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=rf"^optim_{named} .*config=PATH"):
        trainer_groups(model, "fira", ["fc"], tmp_path)
    (reason,) = (s.reason for s in find_targets(model, FiraConfig()).skipped if s.name == matrix)
    assert "parametrized layer" in reason or "beside the weight" in reason
    with pytest.raises(ValueError, match=f"no trainable linear layer: matrices such as {matrix} are trained"):
        find_targets(nn.ModuleDict({"fc": model["fc"]}), FiraConfig())

    # What is advised works, and trains.
    config = FiraConfig(rank=2, lr=0.1, target_modules=[], target_parameters=[matrix])
    p = dict(model.named_parameters())[matrix]
    before = p.detach().clone()
    optimizer = get_fira_optimizer(model, config)
    model["fc"](torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    assert "basis" in optimizer.state[p] and not torch.equal(p, before)


# --------------------------------------------------------------------------- convolutions


def build_convolutions() -> nn.Module:
    layers = {
        "one": nn.Conv1d(16, 24, 3),
        "two": nn.Conv2d(3, 8, 3),
        "depthwise": nn.Conv1d(8, 8, 4, groups=8),
        "transposed": nn.ConvTranspose1d(8, 8, 3),
        "normed": parametrizations.weight_norm(nn.Conv1d(8, 8, 3)),
        "linear": nn.Linear(8, 8),
    }
    return nn.ModuleDict(layers)


@pytest.mark.parametrize("name", ["one", "two", "depthwise", "transposed"])
def test_a_convolution_is_never_taken_for_a_stack(name, tmp_path):
    model = build_convolutions()
    wrong = rf"target_parameters: '{name}.weight' matches .*, a convolution, .*: name '{name}' in target_modules"
    with pytest.raises(ValueError, match=wrong):
        find_targets(model, FiraConfig(target_parameters=[f"{name}.weight"]))
    (chosen,) = (
        t for t in find_targets(model, FiraConfig(target_modules=["linear", name])).projected if name in t.name
    )
    groups = trainer_groups(model, "fira", ["linear", name], tmp_path)
    (of_trainer,) = (group for group in groups if f"{name}.weight" in group["param_names"])
    assert chosen.convolution and chosen.matrices == 1 and of_trainer["convolution"]


def test_the_kernels_of_a_parametrized_convolution_are_not_found_by_its_name(tmp_path):
    wrong = (
        r"target_modules: 'normed' matches no linear layer or convolution, but the convolution normed\..*leave it out"
    )
    with pytest.raises(ValueError, match=f"^{wrong}"):
        find_targets(build_convolutions(), FiraConfig(target_modules=["linear", "normed"]))
    with pytest.raises(ValueError, match=f"^optim_{wrong}"):
        trainer_groups(build_convolutions(), "fira", ["linear", "normed"], tmp_path)


def test_the_kernels_of_a_parametrized_convolution_are_no_stack_either():
    for name in ("normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"):
        with pytest.raises(ValueError, match="a convolution, but only matrices"):
            find_targets(build_convolutions(), FiraConfig(target_parameters=[name]))


def test_a_part_of_a_name_that_finds_a_convolution_too():
    with pytest.raises(ValueError, match="'weight' matches .*, a convolution, .*: name 'one' in target_modules"):
        find_targets(build_convolutions(), FiraConfig(target_parameters=["weight"]))
    assert projected(build_convolutions()) == ["linear.weight"]
    del (model := build_convolutions())["linear"]
    with pytest.raises(ValueError, match=r"convolutions such as one are trained: set target_modules="):
        find_targets(model, FiraConfig())


# --------------------------------------------------------------------------- what is left


def test_a_vector_that_is_named_in_full_is_not_asked_for_more_of_its_name():
    model = nn.ModuleDict({"fc": nn.Linear(4, 8)})
    with pytest.raises(ValueError, match=r"'fc.bias' matches fc.bias, of shape \(8,\), but .*: leave it out"):
        find_targets(model, FiraConfig(target_parameters=["fc.bias"]))


def test_only_matrices_without_a_layer():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "norm": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match="matrices such as table.weight are trained: name them in target_parameters"):
        find_targets(model, FiraConfig())
    assert projected(model, target_modules=[], target_parameters=["table.weight"]) == ["table.weight"]
    with pytest.raises(ValueError, match=r"what is trained \(vector: bias, norm; norm.weight\) Fira does not project"):
        find_targets(nn.ModuleDict({"norm": nn.LayerNorm(4)}), FiraConfig())
    with pytest.raises(ValueError, match="all its parameters are frozen"):
        find_targets(model.requires_grad_(False), FiraConfig())


def test_a_trained_head_alone_says_so_and_how_to_project_it():
    model = build_llama(num_hidden_layers=1).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    wrong = r"are: output head\). The other linear layers \(7\) are frozen: train them or name 'lm_head' in target"
    with pytest.raises(ValueError, match=wrong) as refused:
        find_targets(model, FiraConfig())
    assert "all-linear" not in str(refused.value), "which is the widest there is"
    assert projected(model, target_modules=["lm_head"]) == ["lm_head.weight"]


def test_what_restricts_is_what_the_error_says_to_change():
    settings = {"exclude_modules": ["q_proj", "k_proj"], "layers_to_transform": [0]}
    model = build_llama(num_hidden_layers=1).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Change exclude_modules=\['q_.*'\] or layers_to_transform=\[0\]\.$"):
        find_targets(model, FiraConfig(**settings))


# --------------------------------------------------------------------------- matrices without elements


def build_pruned() -> nn.Module:
    """One layer has lost all its outputs, another all its inputs; a third is whole."""
    return nn.ModuleDict({"no_in": nn.Linear(0, 8), "no_out": nn.Linear(8, 0), "whole": nn.Linear(8, 6)})


def step(model: nn.Module, optimizer) -> None:
    loss = model["whole"](torch.ones(2, 8)).square().sum()
    loss = loss + model["no_out"](torch.ones(2, 8)).sum() + model["no_in"](torch.ones(2, 0)).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["fira", "fira_layerwise"])
def test_matrices_without_elements_are_passed_over(kind):
    model = build_pruned()
    config = FiraConfig(rank=4, target_modules="all-linear", lr=0.1)
    plan = find_targets(model, config)
    assert [target.name for target in plan.projected] == ["whole.weight"]
    assert [s.name for s in plan.skipped if s.reason == "without elements"] == ["no_in.weight", "no_out.weight"]
    optimizer = get_fira_optimizer(model, config)
    assert "Fira projects 1 matrices" in optimizer.summary and "without elements: 0 in 2" in optimizer.summary
    hooks = step_in_backward(optimizer) if kind == "fira_layerwise" else None
    for _ in range(3):
        step(model, optimizer)
    if hooks is not None:
        hooks.remove()
    assert "basis" in optimizer.state[model["whole"].weight]
    assert state_bytes(optimizer) == plan.state_bytes
    other = get_fira_optimizer(model, config)
    other.load_state_dict(optimizer.state_dict())
    step(model, other)
    for peer in ("adamw", "fira", "fira_layerwise", "galore", "apollo", "flora"):
        assert estimate_memory(model, config, optimizer=peer).optimizer_state > 0


def test_naming_only_what_has_no_elements_is_an_error():
    for settings in ({"target_modules": ["no_out"]}, {"target_modules": [], "target_parameters": ["no_in.weight"]}):
        with pytest.raises(ValueError, match="No weight is left to project .*without elements"):
            find_targets(build_pruned(), FiraConfig(**settings))
    with pytest.raises(ValueError, match=r"linear layers are: without elements\)\. Use AdamW\.$"):
        find_targets(nn.Linear(8, 0), FiraConfig())


@pytest.mark.parametrize("refresh", ["staggered", "together"])
@pytest.mark.parametrize("projection", ["power", "svd", "random"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_a_group_by_hand_passes_over_what_has_no_elements(projection, refresh, beside):
    torch.manual_seed(0)
    empty = [nn.Parameter(torch.zeros(shape)) for shape in ((0, 8), (8, 0), (0, 0), (0, 4, 4), (3, 0, 4), (3, 4, 0))]
    full = [weight((8, 6)), weight((3, 6, 4))] if beside else []
    twins = [nn.Parameter(p.detach().clone()) for p in full]
    settings = {"rank": 2, "projection": projection, "refresh": refresh, "update_proj_gap": 2}
    optimizer = FiraAdamW([{"params": [*full, *empty], **settings}])
    others = FiraAdamW([{"params": twins, **settings}]) if beside else None
    for _ in range(4):
        for p in (*full, *empty):
            p.grad = torch.randn_like(p)
        for p, twin in zip(full, twins, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        if others is not None:
            others.step()
    assert all(torch.equal(p, twin) for p, twin in zip(full, twins, strict=True))
    copy = FiraAdamW([{"params": [*full, *empty], **settings}])
    copy.load_state_dict(optimizer.state_dict())


def test_an_adapter_that_is_pruned_to_rank_0_is_passed_over():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_llama(num_hidden_layers=1), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(32, 0, bias=False), nn.Linear(0, 32, bias=False)
    assert all("k_proj" in name for name in projected(model)) and len(projected(model)) == 2
    assert get_fira_optimizer(model, FiraConfig(rank=4)).param_groups[0]["rank"] == 4


def test_what_deepspeed_has_taken_away_is_not_taken_for_a_pruned_weight():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    model["fc"].weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match="flattened weights"):
        find_targets(model, FiraConfig())
