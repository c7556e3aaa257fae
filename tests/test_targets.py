"""Which weights are projected: PEFT's rules for a FiraConfig, the Trainer's own for `optim_target_modules`."""

from __future__ import annotations

import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from conftest import build_llama, build_mixtral, trainer_groups
from fira_hf import FiraConfig
from fira_hf.layers import weights
from fira_hf.targets import find_targets


def build_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def build_bert():
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    )


def build_t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


MODELS = {
    "llama": build_llama,
    "gpt2": build_gpt2,
    "bert": build_bert,
    "t5": build_t5,
    "mixtral": build_mixtral,
}


def projected_modules(model: nn.Module, config: FiraConfig) -> set[str]:
    """Names of the modules whose weight is projected (found by identity, so not by the library's own names)."""
    chosen = {id(entry.parameter) for entry in find_targets(model, config).projected}
    return {name for name, module in model.named_modules() if id(getattr(module, "weight", None)) in chosen}


def peft_modules(model: nn.Module, **settings) -> set[str]:
    """Names of the linear modules that PEFT would adapt under the same settings."""
    config = LoraConfig(**settings)
    _maybe_include_all_linear_layers(config, model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and check_target_module_exists(config, name)
    }


AGREEMENT = {
    "llama": [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.1\..*_proj"},
        {"target_modules": r".*_proj", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "exclude_modules": ["k_proj"]},
        # PEFT does not apply the layer rule to a name that is given in full
        {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_proj"]},
        {"target_modules": ["c_proj"]},
        {"target_modules": r".*mlp\.c_fc"},
        {"target_modules": ["c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["c_fc"], "layers_to_transform": [1]},
        {"target_modules": "all-linear"},
    ],
    "bert": [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["dense"]},
        {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": "all-linear"},
    ],
    "t5": [
        {"target_modules": ["q", "v"]},
        {"target_modules": ["SelfAttention.o", "wo"]},
        {"target_modules": r"decoder\..*(EncDecAttention)\.(k|v)"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"},
        {"target_modules": "all-linear"},
    ],
}


@pytest.mark.parametrize(
    ("model_name", "settings"),
    [(name, settings) for name, cases in AGREEMENT.items() for settings in cases],
    ids=lambda part: part if isinstance(part, str) else " ".join(f"{k}={v}" for k, v in part.items()),
)
def test_the_same_modules_as_peft(model_name, settings):
    model = MODELS[model_name]()
    expected = peft_modules(model, **settings)
    assert expected, "the case must select something"
    assert projected_modules(model, FiraConfig(**settings)) == expected


def test_the_layer_index_is_the_first_number_in_the_name():
    """T5's blocks hold numbered layers themselves. Old versions of PEFT took the last number."""
    model = build_t5()
    config = FiraConfig(target_modules=["q", "wi"], layers_to_transform=[1])
    expected = {name for name, _ in model.named_modules() if ".block.1." in name and name.endswith((".q", ".wi"))}
    assert projected_modules(model, config) == expected != set()


def test_names_match_at_a_dot_only():
    """ "proj" is the end of "q_proj", but not its last dotted part; a string must match the whole name."""
    with pytest.raises(ValueError, match="'proj'"):
        find_targets(build_llama(), FiraConfig(target_modules=["proj"]))
    with pytest.raises(ValueError, match="q_proj"):
        find_targets(build_llama(), FiraConfig(target_modules="q_proj"))


PATTERNS = [
    {"q_proj": 4},
    {"layers.0.self_attn.q_proj": 2, "q_proj": 4},
    {r"layers\.\d+\.mlp\..*": 6},
    {"(q|k)_proj": 3, ".*": 5},
    {r"^model\.layers\.1\..*": 7},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rank_and_alpha_patterns_pick_the_key_that_peft_picks(pattern):
    model = build_llama()
    alphas = {key: value / 10 for key, value in pattern.items()}
    config = FiraConfig(rank=9, alpha=0.9, rank_pattern=pattern, alpha_pattern=alphas)
    names = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    entries = find_targets(model, config).projected
    assert len(entries) == 14
    for entry in entries:
        key = get_pattern_key(pattern.keys(), names[id(entry.parameter)])
        assert entry.rank == pattern.get(key, 9)
        assert entry.alpha == pytest.approx(alphas.get(key, 0.9))


def test_flags_of_a_pattern_are_its_own():
    ranks = {"(?i)Q_PROJ|up_proj": 4, "K_PROJ|v_proj": 2}
    plan = find_targets(build_llama(), FiraConfig(rank=3, rank_pattern=ranks))
    expected = {"q_proj": 4, "up_proj": 4, "v_proj": 2}
    assert all(t.rank == expected.get(t.name.split(".")[-2], 3) for t in plan.projected)
    config = FiraConfig(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="(?i)LAYERS")
    assert projected_modules(build_llama(), config) == {"model.layers.1.self_attn.q_proj"}


def test_a_pattern_that_an_earlier_one_shadows_is_an_error():
    """PEFT tries patterns in order and would never come to this one."""
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*earlier entry"):
        find_targets(build_llama(), FiraConfig(rank_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 2}))


# --------------------------------------------------------------------------- parameters that are no linear layer's


def peft_parameters(model: nn.Module, **settings) -> dict[str, int]:
    """Name -> rank of each parameter that PEFT adapts under the same settings."""
    adapted = get_peft_model(model, LoraConfig(r=9, target_modules=[], **settings)).base_model.model
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module.r["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, ParamWrapper)
    }


@pytest.mark.parametrize(
    "targets",
    [
        ["gate_up_proj"],
        ["experts.gate_up_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["model.layers.1.mlp.experts.down_proj"],
        ["gate.weight"],  # a router: a matrix
        ["q_proj.weight", "down_proj"],
        ["lm_head.weight", "embed_tokens.weight"],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "pattern", [{}, {"gate_up_proj|weight": 3, ".*experts.*": 5, "experts": 7}], ids=["one rank", "ranks"]
)
def test_target_parameters_are_those_of_peft(targets, pattern):
    expected = peft_parameters(build_mixtral(), target_parameters=targets, rank_pattern=pattern)
    assert expected, "the case must select something"
    model = build_mixtral()
    config = FiraConfig(rank=9, target_modules=[], target_parameters=targets)
    assert {target.name for target in find_targets(model, config).projected} == set(expected)
    if pattern and all(".experts." in name for name in expected):
        # PEFT leaves out keys that match nothing, here they are errors.
        config.rank_pattern = {key: rank for key, rank in pattern.items() if rank in expected.values()}
        ranks = {target.name: target.rank for target in find_targets(model, config).projected}
        assert ranks == expected


@pytest.mark.parametrize("entry", ["proj", "experts", "up_proj", "mlp.gate_up_proj", "q_proj"])
def test_parameters_are_named_in_full_or_from_a_dot_on(entry):
    with pytest.raises(ValueError, match="target_parameters"):
        peft_parameters(build_mixtral(), target_parameters=[entry])
    with pytest.raises(ValueError, match=f"target_parameters: '{entry}' matches no parameter"):
        find_targets(build_mixtral(), FiraConfig(target_parameters=[entry]))


def experts_of(plan) -> set[str]:
    return {target.name for target in plan.projected if ".experts." in target.name}


STACKS = {f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")}


def test_all_linear_covers_the_experts():
    """PEFT finds no layer there that it could wrap; an optimizer needs none."""
    model = build_mixtral()
    plan = find_targets(model, FiraConfig(rank=8))
    assert experts_of(plan) == STACKS
    assert projected_modules(model, FiraConfig()) == peft_modules(model, target_modules="all-linear")
    assert {target.matrices for target in plan.projected} == {1, 4}


def test_all_linear_takes_only_experts_of_what_is_three_dimensional():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 8, 8))

    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "other": Other(), "conv": nn.Conv1d(8, 8, 3)})
    plan = find_targets(model, FiraConfig())
    assert [target.name for target in plan.projected] == ["linear.weight"]
    reasons = {entry.name: entry.reason for entry in plan.skipped}
    assert "Other" in reasons["other.table"] and "Conv1d" in reasons["conv.weight"]
    plan = find_targets(model, FiraConfig(target_parameters=["table"]))
    assert [(target.name, target.matrices) for target in plan.projected] == [("linear.weight", 1), ("other.table", 3)]


def test_experts_that_are_left_out_name_the_setting_that_takes_them():
    plan = find_targets(build_mixtral(), FiraConfig(target_modules=["q_proj"]))
    reasons = {entry.name: entry.reason for entry in plan.skipped}
    assert {name for name, reason in reasons.items() if "target_parameters" in reason} == STACKS


@pytest.mark.parametrize("targets", [{}, {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}])
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"exclude_modules": ["experts.down_proj"]}, "gate_up"),
        ({"exclude_modules": ["layers.0.mlp.experts"]}, ".1."),
        ({"exclude_modules": r".*\.1\..*"}, ".0."),
        ({"layers_to_transform": 1}, ".1."),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, ".0."),
    ],
    ids=str,
)
def test_experts_are_restricted_as_layers_are(settings, part, targets):
    left = {name for name in STACKS if part in name}
    plan = find_targets(build_mixtral(), FiraConfig(**targets, **settings))
    assert experts_of(plan) == left
    reasons = {entry.name: entry.reason for entry in plan.skipped}
    (setting,) = settings.keys() - {"layers_pattern"}
    assert {name for name, reason in reasons.items() if setting in reason} & STACKS == STACKS - left


def test_a_parameter_that_is_named_in_full_needs_no_index():
    name = "model.layers.0.mlp.experts.down_proj"
    config = FiraConfig(target_modules=[], target_parameters=[name, "gate_up_proj"], layers_to_transform=[1])
    plan = find_targets(build_mixtral(), config)
    assert experts_of(plan) == {name, "model.layers.1.mlp.experts.gate_up_proj"}


def test_ranks_and_alphas_of_experts():
    config = FiraConfig(rank=50, rank_pattern={"gate_up_proj": 4}, alpha_pattern={r"layers\.1\..*experts.*": 0.5})
    found = {target.name: target for target in find_targets(build_mixtral(), config).projected}
    for name in STACKS:
        assert found[name].rank == (4 if "gate_up" in name else 32), "cut to the short side of an expert"
        assert found[name].alpha == (0.5 if ".1." in name else 1.0)


@pytest.mark.parametrize(
    ("entry", "near"),
    [("gate_up_porj", "gate_up_proj"), ("mlp.experts.donw_proj", "down_proj"), ("nothing", "down_proj")],
)
def test_an_unmatched_parameter_is_named_with_real_names_nearby(entry, near):
    with pytest.raises(ValueError, match=f"target_parameters: '{entry}' matches no parameter.*{near}'"):
        find_targets(build_mixtral(), FiraConfig(target_parameters=["gate_up_proj", entry]))


def test_a_parameter_that_is_no_matrix_is_an_error():
    with pytest.raises(
        ValueError, match=r"target_parameters: 'norm.weight' matches model.norm.weight, of shape \(32,\)"
    ):
        find_targets(build_mixtral(), FiraConfig(target_parameters=["norm.weight"]))


def test_a_frozen_parameter_says_so():
    model = build_mixtral()
    for name, p in model.named_parameters():
        p.requires_grad_("experts" not in name)
    assert not experts_of(find_targets(model, FiraConfig()))
    with pytest.raises(ValueError, match="target_parameters: 'gate_up_proj' matches only frozen weights"):
        find_targets(model, FiraConfig(target_parameters=["gate_up_proj"]))


@pytest.mark.parametrize("entry", ["experts", "gate_up_proj", "mlp.experts.down_proj"])
def test_experts_asked_for_as_modules_are_sent_to_the_right_setting(entry):
    with pytest.raises(ValueError, match=f"target_modules: '{entry}'.*target_parameters"):
        find_targets(build_mixtral(), FiraConfig(target_modules=["q_proj", entry]))


def test_the_trainer_sends_experts_to_the_right_setting(tmp_path):
    with pytest.raises(ValueError, match="optim_target_modules: 'experts'.*target_parameters.*config=PATH"):
        trainer_groups(build_mixtral(), "fira", ["attn", "experts"], tmp_path)


def test_under_a_peft_model_the_adapters_of_experts_are_chosen():
    model = get_peft_model(build_mixtral(), LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    plan = find_targets(model, FiraConfig(target_modules=["experts"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and [target.name for target in plan.projected] == [n for n in trained if ".experts." in n]
    with pytest.raises(ValueError, match="target_parameters: 'experts.down_proj' matches only frozen weights"):
        find_targets(model, FiraConfig(target_parameters=["experts.down_proj"]))


def test_a_trained_copy_of_the_experts_answers_to_their_names():
    model = get_peft_model(build_mixtral(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    for config in (FiraConfig(), FiraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])):
        found = experts_of(find_targets(model, config))
        assert len(found) == (4 if config.target_parameters is None else 2)
        assert all("modules_to_save" in name for name in found)


# --------------------------------------------------------------------------- fused projections


def splits(model, config) -> dict[str, tuple[int, bool]]:
    return {t.name: (t.split, t.transposed) for t in find_targets(model, config).projected if t.split > 1}


def test_split_pattern_is_matched_as_rank_pattern_is():
    found = splits(build_gpt2(), FiraConfig(split_pattern={r"h\.0\.attn\.c_attn": 3, "c_fc": 2}))
    assert found == {
        "transformer.h.0.attn.c_attn.weight": (3, True),
        "transformer.h.0.mlp.c_fc.weight": (2, True),
        "transformer.h.1.mlp.c_fc.weight": (2, True),
    }
    found = splits(build_mixtral(), FiraConfig(split_pattern={"experts.gate_up_proj": 2}))
    assert found == {name: (2, False) for name in STACKS if "gate_up" in name}


def test_parts_are_cut_along_the_outputs():
    """(32, 96) in GPT-2: three parts of 32 outputs; the rank is cut to the short side of a part."""
    (target,) = find_targets(
        build_gpt2(),
        FiraConfig(
            rank=50, target_modules=["c_attn"], split_pattern={"c_attn": 12}, layers_to_transform=0, layers_pattern="h"
        ),
    ).projected
    assert (target.matrices, target.rank) == (12, 8)


@pytest.mark.parametrize(
    ("build", "pattern", "words"),
    [
        (build_gpt2, {"c_attn": 5}, "5 does not divide the output dimension of .*c_attn.*equal|unequal"),
        (build_gpt2, {"c_atn": 3}, "split_pattern: 'c_atn' matches no projected layer.*'c_attn'"),
        (build_gpt2, {"wte": 2}, "split_pattern: 'wte' matches no projected layer"),
    ],
    ids=["does not divide", "misspelt", "not projected"],
)
def test_a_split_that_cannot_be_made_is_an_error(build, pattern, words):
    with pytest.raises(ValueError, match=words):
        find_targets(build(), FiraConfig(split_pattern=pattern))


def test_interleaved_parts_are_refused():
    """GPT-OSS stores gate and up in turns: its first half is no part of either."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        head_dim=8,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    experts = [t for t in find_targets(model, FiraConfig()).projected if ".experts." in t.name]
    says_how_it_stores = not transformers.__version__.startswith("4.")
    assert {t.transposed for t in experts} == {says_how_it_stores}
    with pytest.raises(ValueError, match=r"split_pattern: .*gate_up_proj.*one after another"):
        find_targets(model, FiraConfig(split_pattern={"gate_up_proj": 2}))


# --------------------------------------------------------------------------- the Trainer's rule


@pytest.fixture(scope="module")
def galore():
    """The Trainer's GaLore; its package imports bitsandbytes for the 8-bit variant, which is not used here."""
    if importlib.util.find_spec("galore_torch") is None:
        pytest.skip("needs galore_torch")
    if importlib.util.find_spec("bitsandbytes") is None:
        names = ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
        stubs = {name: types.ModuleType(name) for name in names}
        stubs["bitsandbytes"].functional = stubs["bitsandbytes.functional"]
        stubs["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer
        with mock.patch.dict(sys.modules, stubs):
            import galore_torch
            import galore_torch.adamw8bit
        # patch.dict takes out again whatever came in while it was active
        sys.modules["galore_torch"] = galore_torch


@pytest.mark.parametrize(
    "targets",
    [
        ["attn", "mlp"],
        ["q_proj"],
        ["layers.1"],
        ["proj"],
        [r".*\.layers\.0\..*up_proj"],
        ["model.layers.0.mlp.gate_proj", r".*v_proj"],
        # each means what it does alone: flags, and groups that are referred to
        [r"(?i).*Q_PROJ"],
        [r".*K_PROJ|.*v_proj", r"(?i).*Q_PROJ"],
        [r"(?i).*Q_PROJ", r".*K_PROJ|.*v_proj"],
        [r"(?ix) .*Q_PROJ  # queries", "v_proj"],
        [r".*\.(up)_proj", r".*a(t)\1n\.v_proj"],
        [r".*\.(?P<kind>q)_proj", r".*\.(?P<kind>k)_proj"],
        r".*\.(q|k)_proj",
        r".*layers\.1.*",
        r"model\.layers\.0\.mlp\.down_proj",
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True], ids=["all trainable", "layer 0 frozen"])
def test_optim_target_modules_chooses_what_galore_chooses(targets, frozen, tmp_path, galore):
    model = build_llama()
    model.model.layers[0].requires_grad_(not frozen)

    def chosen(optim):
        groups = trainer_groups(model, optim, targets, tmp_path)
        parameters = {id(p) for group in groups if "rank" in group for p in group["params"] if p.requires_grad}
        return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}

    entries = targets if isinstance(targets, list) else [targets]
    if frozen and any("layers.0" in entry or r"layers\.0" in entry for entry in entries):
        # GaLore now trains nothing of what this entry asks for, and does not say so
        with pytest.raises(ValueError, match="frozen"):
            chosen("fira")
    else:
        assert chosen("fira") == chosen("galore_adamw") != set()


class Nested(nn.Module):
    """The whole name of one layer is the end of another's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)})


@pytest.mark.parametrize("targets", ["proj", ["proj"], ["block"], r"block\..*"], ids=str)
def test_the_trainers_rule_where_one_name_ends_another(targets, tmp_path, galore):
    model = Nested()
    chosen = [
        {
            id(p)
            for group in trainer_groups(model, optim, targets, tmp_path)
            if "rank" in group
            for p in group["params"]
        }
        for optim in ("galore_adamw", "fira")
    ]
    assert chosen[0] == chosen[1]


# --------------------------------------------------------------------------- what is left out, and why


def skipped_reasons(model, config) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(entry.parameter)]: entry.reason for entry in find_targets(model, config).skipped}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_trainable_weight_is_projected_or_skipped_with_a_reason(build):
    model = build()
    plan = find_targets(model, FiraConfig())
    listed = [id(entry.parameter) for entry in [*plan.projected, *plan.skipped]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    assert all(isinstance(entry.reason, str) and entry.reason.strip() for entry in plan.skipped)


def test_the_reasons_are_true():
    model = build_gpt2()
    reasons = skipped_reasons(model, FiraConfig())
    # the embedding is also the tied output head, and either is a reason
    assert any(word in reasons["transformer.wte.weight"] for word in ("head", "embedding"))
    assert "embedding" in reasons["transformer.wpe.weight"]
    assert "norm" in reasons["transformer.ln_f.weight"]
    assert "bias" in reasons["transformer.h.0.attn.c_attn.bias"]
    assert not any("attn.c_attn.weight" in name for name in reasons)


def test_a_frozen_weight_is_neither_projected_nor_trained():
    model = build_llama()
    model.model.layers[0].requires_grad_(False)
    plan = find_targets(model, FiraConfig(target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    assert {id(e.parameter) for e in plan.projected} == {
        id(model.model.layers[1].self_attn.q_proj.weight),
        id(model.model.layers[1].mlp.up_proj.weight),
    }
    assert all(entry.parameter.requires_grad for entry in plan.skipped)


def test_the_untied_head_is_reported_as_the_head():
    assert "head" in skipped_reasons(build_llama(), FiraConfig())["lm_head.weight"].lower()


def test_a_linear_layer_that_was_not_asked_for_says_so():
    reasons = skipped_reasons(build_llama(), FiraConfig(target_modules=["q_proj"]))
    assert "target_modules" in reasons["model.layers.0.self_attn.k_proj.weight"]
    reasons = skipped_reasons(build_llama(), FiraConfig(exclude_modules=["k_proj"]))
    assert "exclude_modules" in reasons["model.layers.0.self_attn.k_proj.weight"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj"]}, "embedding, tied to the output head, which is not in target_modules"),
        (
            {"target_modules": r".*(q_proj|lm_head)", "exclude_modules": ["lm_head"]},
            "embedding, tied to the output head, which is in exclude_modules",
        ),
    ],
    ids=str,
)
def test_what_an_embedding_is_tied_to_is_named(settings, reason):
    model = build_llama(tie_word_embeddings=True)
    assert skipped_reasons(model, FiraConfig(**settings))["model.embed_tokens.weight"] == reason


def test_a_tied_layer_that_is_no_output_head_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.decoder, self.body = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(8, 8)
            self.decoder.weight = self.words.weight

    for setting, value in (("target_modules", "body"), ("exclude_modules", "decoder")):
        reason = skipped_reasons(Tied(), FiraConfig(**{setting: [value]}))["words.weight"]
        assert reason == f"embedding, tied to decoder, which is {'not ' * (value == 'body')}in {setting}"


def test_an_embedding_that_is_tied_to_nothing_is_not_said_to_be():
    settings = {"target_parameters": ["embed_tokens.weight"], "exclude_modules": ["embed_tokens"]}
    reasons = skipped_reasons(build_llama(), FiraConfig(**settings))
    assert reasons["model.embed_tokens.weight"] == "in exclude_modules"


def test_a_weight_shared_by_two_layers_is_one_entry():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.second.weight = self.first.weight

    model = Shared()
    entries = find_targets(model, FiraConfig()).projected
    assert [id(entry.parameter) for entry in entries].count(id(model.first.weight)) == 1
    assert {id(entry.parameter) for entry in entries} == {id(model.first.weight), id(model.third.weight)}


def test_a_tied_head_asked_for_by_name_is_projected_once():
    model = build_llama(tie_word_embeddings=True)
    entries = find_targets(model, FiraConfig(target_modules=["q_proj", "lm_head"])).projected
    assert [entry.parameter is model.model.embed_tokens.weight for entry in entries].count(True) == 1


def test_a_plain_module_works_without_transformers_classes():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert projected_modules(model, FiraConfig()) == peft_modules(model, target_modules="all-linear") == {"0", "2"}
    assert projected_modules(model, FiraConfig(target_modules=["2"])) == {"2"}


def test_the_meta_device_gives_the_same_plan():
    with torch.device("meta"):
        on_meta = build_llama()
    names = [
        [entry.name for entry in find_targets(model, FiraConfig()).projected] for model in (on_meta, build_llama())
    ]
    assert names[0] == names[1]


def test_excluding_what_is_frozen_anyway_is_no_error():
    """The exclusion is met; PEFT accepts it, too."""
    model = build_llama()
    model.lm_head.requires_grad_(False)
    config = FiraConfig(target_modules=r".*(q_proj|lm_head)", exclude_modules=["lm_head"])
    assert len(find_targets(model, config).projected) == 2


def test_all_linear_takes_layers_to_transform():
    model = build_llama()
    assert projected_modules(model, FiraConfig(layers_to_transform=1)) == {
        name for name in peft_modules(model, target_modules="all-linear") if ".layers.1." in name
    }


def test_what_holds_a_weight_compares_without_looking_at_it():
    # Since Python 3.13 the generated __eq__ compares field by field, and a weight has no one truth value.
    first, second = (find_targets(build_llama(), FiraConfig(rank=4)) for _ in range(2))
    assert first != second
    for one, other in zip(first.projected + first.skipped, second.projected + second.skipped, strict=True):
        assert one == one and one != other and other not in {one}
        assert "tensor" not in repr(one)
    layers = weights(build_llama())
    assert layers[0] != weights(build_llama())[0] and layers.index(layers[1]) == 1
