"""FiraConfig: what it accepts, what it refuses and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fira_hf import PUBLISHED, FiraAdamW, FiraConfig
from fira_hf.targets import find_targets

DEFAULTS = {
    "rank": 128,
    "alpha": 1.0,
    "update_proj_gap": 10,
    "gamma": 2.0,
    "target_modules": "all-linear",
    "target_parameters": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "split_pattern": {},
    "projection": "power",
    "refresh": "staggered",
    "moments": "rotated",
    "base_optimizer": "adamw",
    "scaling": "column",
    "residual": "reference",
    "limiter": "growth",
    "adjust_lr": "match_rms_adamw",
    "state_dtype": "float32",
    "stochastic_rounding": False,
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "correct_bias": True,
    "weight_decay": 0.0,
    "dense_lr": None,
}
# What the published code does where the defaults differ.
PUBLISHED_HERE = {"projection": "svd", "refresh": "together", "moments": "kept", "update_proj_gap": 200}
PUBLISHED_HERE |= {"gamma": 1.01, "adjust_lr": "none"}

EVERY_FIELD_SET = {
    "rank": 8,
    "alpha": 0.25,
    "update_proj_gap": 50,
    "gamma": None,
    "target_modules": ["q_proj", "mlp.down_proj"],
    "target_parameters": ["experts.gate_up_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"down_proj": 4},
    "alpha_pattern": {"q_proj": 0.5},
    "split_pattern": {"gate_up_proj": 2},
    "projection": "power",
    "refresh": "staggered",
    "moments": "rotated",
    "base_optimizer": "lion",
    "scaling": "matrix",
    "residual": "paper",
    "limiter": "growth",
    "adjust_lr": "none",
    "state_dtype": "bfloat16",
    "stochastic_rounding": True,
    "lr": 3e-4,
    "betas": (0.8, 0.95),
    "eps": 1e-8,
    "correct_bias": False,
    "weight_decay": 0.1,
    "dense_lr": 1e-5,
}


def test_defaults_and_the_published_choice():
    config = FiraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    published = FiraConfig(**PUBLISHED)
    assert {name: getattr(published, name) for name in DEFAULTS} == DEFAULTS | PUBLISHED_HERE


def test_the_tests_here_know_every_field():
    names = {field.name for field in dataclasses.fields(FiraConfig)}
    assert names == set(DEFAULTS) == set(EVERY_FIELD_SET)


def test_two_configs_do_not_share_their_patterns():
    FiraConfig().rank_pattern["q_proj"] = 4
    assert FiraConfig().rank_pattern == {}


BAD_VALUES = [
    *[("rank", value) for value in (0, -1, 2.5, "8", True, None)],
    *[("update_proj_gap", value) for value in (0, -200, 1.5, "50", True, None)],
    *[("alpha", value) for value in (-1e-9, -1.0, math.nan, math.inf, "1.0", True, None)],
    *[("gamma", value) for value in (0.99, 0.0, -1.01, math.nan, "1.01", True)],
    *[("limiter", value) for value in ("clip", "Growth", None)],
    *[("correct_bias", value) for value in ("false", 0, None)],
    *[("scaling", value) for value in ("row", "Column", None, True)],
    *[("residual", value) for value in ("code", "", None)],
    *[("adjust_lr", value) for value in ("original", None)],
    *[("projection", value) for value in ("qr", "SVD", "sketch", None)],
    *[("refresh", value) for value in ("Staggered", True, None)],
    *[("moments", value) for value in ("keep", None)],
    *[("base_optimizer", value) for value in ("adam", "Lion", None)],
    *[("state_dtype", value) for value in ("float16", "bf16", None)],
    *[("stochastic_rounding", value) for value in ("true", 1, None)],
    *[("lr", value) for value in (-1e-3, math.nan, math.inf, "1e-3", None)],
    *[("dense_lr", value) for value in (-1e-3, math.nan, math.inf, "1e-3")],
    *[
        ("betas", value)
        for value in ((0.9,), (0.9, 1.0), (-0.1, 0.999), (0.9, math.nan), 0.9, "0.9", (0.9, 0.99, 0.999))
    ],
    *[("eps", value) for value in (-1e-8, math.nan, "1e-8", None)],
    *[("weight_decay", value) for value in (-0.1, math.nan, math.inf, "0.1", None)],
    *[("target_modules", value) for value in ([], "", "q_proj(", [""], ["q_proj", 3], 7, None)],
    *[("target_parameters", value) for value in ([], "experts.gate_up_proj", [""], ["gate_up_proj", 3], 7)],
    *[
        ("split_pattern", value)
        for value in ({"c_attn": 1}, {"c_attn": 1.5}, {"c_attn(": 3}, {3: 3}, ["c_attn"], None)
    ],
    *[("exclude_modules", value) for value in ("q_proj(", [3], 7)],
    *[("layers_to_transform", value) for value in (-1, [0, -1], ["0"], 1.5, "1", True)],
    *[("layers_pattern", value) for value in ("layers(", ["layers", "h("], [3], [])],
    *[("rank_pattern", value) for value in ({"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": "8"}, {"q_proj(": 8}, {3: 8})],
    *[("alpha_pattern", value) for value in ({"q_proj": 0}, {"q_proj": "1"}, {"q_proj(": 1.0}, {3: 1.0})],
    *[("alpha_pattern", {"q_proj": math.nan}), ("rank_pattern", ["q_proj"]), ("alpha_pattern", "q_proj")],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda part: part if isinstance(part, str) else repr(part))
def test_a_bad_value_is_refused_by_name_and_value(name, value):
    others = {"layers_pattern": {"layers_to_transform": 0}}.get(name, {})  # the bad value is the only thing wrong
    with pytest.raises(ValueError) as refused:
        FiraConfig(**others, **{name: value})
    message = str(refused.value)
    assert name in message
    # of a container it is enough that the message shows the part that is wrong
    parts = (
        list(value.items())[0] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    )
    assert any(repr(part) in message or str(part) in message for part in [value, *parts])


def test_layers_pattern_needs_layers_to_transform():
    with pytest.raises(ValueError, match="layers_pattern.*layers_to_transform"):
        FiraConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_no_modules_at_all_need_parameters():
    """As in PEFT: an empty list is how to project parameters only."""
    config = FiraConfig(target_modules=[], target_parameters=("experts.down_proj",))
    assert (config.target_modules, config.target_parameters) == ([], ["experts.down_proj"])


def test_layers_to_transform_does_not_go_with_a_pattern():
    """As in PEFT, where a pattern that names its own layers would leave it without effect."""
    with pytest.raises(ValueError, match="layers_to_transform.*target_modules|target_modules.*layers_to_transform"):
        FiraConfig(target_modules=r".*q_proj", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"alpha": 0.0, "residual": "paper"}, "alpha=0 with residual='paper'"),
        ({"alpha": 0.0, "residual": "none"}, "alpha=0 with residual='none'"),
        ({"gamma": 0.99}, "gamma=0.99 is not valid for limiter='growth'"),
        ({"limiter": "shrink"}, "gamma=2.0 is not valid for limiter='shrink'"),
        ({"limiter": "scale", "gamma": 2}, "gamma=2 is not valid for limiter='scale'"),
    ],
)
def test_contradictions_of_the_update_are_refused_in_config_and_group(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        FiraConfig(**settings)
    with pytest.raises(ValueError, match=wrong):
        FiraAdamW([{"params": [torch.nn.Parameter(torch.zeros(4, 3))], "rank": 2, **settings}])


@pytest.mark.parametrize("gamma", [None, 1.0])
@pytest.mark.parametrize("limiter", ["growth", "shrink", "scale"])
def test_no_limit_goes_with_every_limiter(limiter, gamma):
    assert FiraConfig(limiter=limiter, gamma=gamma).gamma == gamma


def test_the_edges_of_the_allowed_ranges():
    config = FiraConfig(rank=1, update_proj_gap=1, gamma=1.0, lr=0.0, weight_decay=0.0, betas=(0.0, 0.0), alpha=1)
    assert (config.rank, config.gamma, config.betas) == (1, 1.0, (0.0, 0.0))


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("settings", [{}, EVERY_FIELD_SET], ids=["defaults", "every field set"])
@pytest.mark.parametrize("from_file", [False, True], ids=["from directory", "from file"])
def test_save_and_load(tmp_path, settings, from_file):
    config = FiraConfig(**settings)
    config.save_pretrained(tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder"
    loaded = FiraConfig.from_pretrained(path / "fira_config.json" if from_file else str(path))
    assert loaded == config
    assert loaded.betas == config.betas and isinstance(loaded.betas, type(config.betas))


def test_the_file_is_sorted_json_that_ends_with_a_newline(tmp_path):
    FiraConfig(**EVERY_FIELD_SET).save_pretrained(tmp_path)
    text = (tmp_path / "fira_config.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert list(content) == sorted(content)
    assert text.endswith("}\n") and not text.endswith("\n\n")
    assert set(EVERY_FIELD_SET) <= set(content)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 16), ("gamma", None), ("scaling", "none"), ("betas", (0.9, 0.95)), ("lr", 1e-5)]
)
def test_one_changed_field_is_one_changed_line(tmp_path, name, value):
    FiraConfig().save_pretrained(tmp_path / "before")
    FiraConfig(**{name: value}).save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / when / "fira_config.json").read_text().splitlines() for when in ("before", "after"))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1


def test_saving_keeps_the_order_in_which_patterns_are_tried(tmp_path, tiny_llama):
    """The first matching pattern wins, so the order is part of the meaning although the file's keys are sorted."""
    config = FiraConfig(rank=16, rank_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 2, ".*_proj": 8})
    config.save_pretrained(tmp_path)
    loaded = FiraConfig.from_pretrained(tmp_path)
    model = tiny_llama()
    ranks = [{entry.name: entry.rank for entry in find_targets(model, each).projected} for each in (config, loaded)]
    assert ranks[0] == ranks[1]


def test_to_dict_is_a_copy():
    config = FiraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    content = config.to_dict()
    content["target_modules"].append("k_proj")
    content["rank_pattern"]["k_proj"] = 4
    assert config == FiraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})


@pytest.mark.parametrize(
    ("typo", "nearest"), [("rnak", "rank"), ("update_proj_gp", "update_proj_gap"), ("beta", "betas")]
)
def test_an_unknown_key_in_the_file_names_the_nearest_field(tmp_path, typo, nearest):
    (tmp_path / "fira_config.json").write_text(json.dumps({typo: 8}))
    with pytest.raises(ValueError) as refused:
        FiraConfig.from_pretrained(tmp_path)
    assert repr(typo) in str(refused.value) and repr(nearest) in str(refused.value)


def test_a_bad_value_in_the_file_is_refused_too(tmp_path):
    (tmp_path / "fira_config.json").write_text(json.dumps({"rank": 0}))
    with pytest.raises(ValueError, match="rank.*0"):
        FiraConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises((OSError, ValueError)) as refused:
        FiraConfig.from_pretrained(tmp_path / "absent")
    assert "absent" in str(refused.value)
    assert "fira_config.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{rank: 8}", "[8]", '"rank=8"'], ids=["empty", "no JSON", "a list", "a string"])
def test_a_file_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "fira_config.json").write_text(text)
    with pytest.raises(ValueError) as refused:
        FiraConfig.from_pretrained(tmp_path)
    assert "fira_config.json" in str(refused.value)


def test_a_part_of_the_fields_is_enough_in_the_file(tmp_path):
    (tmp_path / "fira_config.json").write_text(json.dumps({"rank": 8, "betas": [0.9, 0.95]}))
    assert FiraConfig.from_pretrained(tmp_path) == FiraConfig(rank=8, betas=(0.9, 0.95))
