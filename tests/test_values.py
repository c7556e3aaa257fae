"""Values as other libraries hand them over: numbers of numpy, torch and the standard library, sequences and mappings
that are no list and no dict (OmegaConf's). What is kept is Python's own, so that files and checkpoints stay plain."""

from __future__ import annotations

import collections
import json
import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from conftest import build_llama, trainer_settings
from fira_hf import FiraAdamW, FiraConfig
from fira_hf import functional as F
from fira_hf.arguments import config_from_args, parse_optim_args
from fira_hf.rules import RULES
from reference import weight

INTEGERS = [np.int64(3), np.uint8(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3])]
REALS = [
    *[np.float32(0.25), np.float64(0.25), np.float16(0.25), np.longdouble(0.25), np.array(0.25), np.array([0.25])],
    *[torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, requires_grad=True)],
    *[torch.tensor(0.25, dtype=torch.bfloat16), torch.nn.Parameter(torch.tensor([0.25]))],
    *[Fraction(1, 4), Decimal("0.25")],
]
COUNTED = ("rank", "update_proj_gap", "layers_to_transform")
MEASURED = ("alpha", "lr", "eps", "weight_decay", "dense_lr")
OF_GROUP = [*(("rank", v, 3) for v in INTEGERS), *((name, v, 0.25) for name in ("alpha", "lr", "eps") for v in REALS)]


def same(value, expected) -> bool:
    """Equal, and of the same type: 3.0, True and np.int64(3) are not 3."""
    return type(value) is type(expected) and value == expected


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_any_integer_is_an_integer(value):
    config = FiraConfig(rank_pattern={"q_proj": value}, split_pattern={"k": value}, **dict.fromkeys(COUNTED, value))
    for found in [
        *(getattr(config, name) for name in COUNTED),
        config.rank_pattern["q_proj"],
        config.split_pattern["k"],
    ]:
        assert same(found, 3)
    # A number is a number: integers are taken where any number is, and stay as exact as they were.
    assert same(FiraConfig(alpha=value).alpha, 3)


@pytest.mark.parametrize("value", REALS, ids=repr)
def test_any_real_number_is_a_number(value):
    settings = dict.fromkeys(MEASURED, value) | {"gamma": value, "limiter": "scale", "betas": (value, value)}
    config = FiraConfig(alpha_pattern={"q_proj": value}, **settings)
    for found in [*(getattr(config, n) for n in (*MEASURED, "gamma")), *config.betas, config.alpha_pattern["q_proj"]]:
        assert same(found, 0.25)
    assert json.loads(json.dumps(config.to_dict())) == FiraConfig(**config.to_dict()).to_dict()
    with pytest.raises(ValueError, match="(?s)rank=.*is not valid: rank must be an integer"):
        FiraConfig(rank=value)


@pytest.mark.parametrize("value", [np.True_, np.array(True), torch.tensor(True)], ids=repr)
def test_a_truth_value_is_one_and_no_number(value):
    assert FiraConfig(correct_bias=value, stochastic_rounding=value).correct_bias is True
    for name in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"{name}=.*is not valid"):
            FiraConfig(**{name: value})
    for number in (1, np.int64(1), torch.tensor(1)):
        with pytest.raises(ValueError, match="correct_bias=.*True or False"):
            FiraConfig(correct_bias=number)


@pytest.mark.parametrize("name", ["alpha", "lr", "betas"])
@pytest.mark.parametrize(
    "value",
    [
        *[np.float32("nan"), torch.tensor(torch.inf), Decimal("Infinity"), 10**400, np.complex64(1), 1j],
        *[torch.tensor([0.1, 0.2, 0.3]), np.zeros(0), torch.zeros((), device="meta"), np.array("0.1"), b"\0\0"],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_finite_number_is_refused_in_words(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is not valid: {name} must be"):
        FiraConfig(**{name: value})


@pytest.mark.parametrize(("name", "value", "expected"), OF_GROUP, ids=repr)
def test_groups_by_hand_take_them_too(name, value, expected):
    (group,) = FiraAdamW([{"params": [weight((8, 6))], "rank": 2} | {name: value}]).param_groups
    assert same(group[name], expected)


def test_defaults_of_the_optimizer_are_plain_in_every_group():
    betas = torch.tensor([0.5, 0.75])
    optimizer = FiraAdamW(
        [weight((8, 6))], lr=np.float32(0.25), betas=betas, eps=Fraction(1, 2), weight_decay=np.int8(1)
    )
    group = optimizer.param_groups[0]
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay")] == [0.25, (0.5, 0.75), 0.5, 1]
    assert all(type(x) in (float, int) for x in (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))


def test_a_tensor_as_learning_rate_is_read_once_and_schedules_go_on():
    """As they do with a float: torch's schedules fill a tensor in place, and assign a number."""
    lr = torch.tensor(0.25)
    trained, plain = weight((8, 6)), weight((8, 6))
    optimizers = [FiraAdamW([{"params": [p], "rank": 2}], lr=one) for p, one in ((trained, lr), (plain, 0.25))]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    lr.fill_(100.0)
    for _ in range(3):
        for p, optimizer, schedule in zip((trained, plain), optimizers, schedules, strict=True):
            p.grad = torch.ones(8, 6).tril()
            optimizer.step()
            schedule.step()
    assert torch.equal(trained, plain)
    assert same(optimizers[0].param_groups[0]["lr"], 0.03125)


def test_a_tensor_assigned_as_learning_rate_is_read_and_left_alone():
    trained, plain = weight((8, 6)), weight((8, 6))
    optimizers = [FiraAdamW([{"params": [p], "rank": 2}], lr=0.25) for p in (trained, plain)]
    optimizers[0].param_groups[0]["lr"] = lr = torch.tensor(0.25)
    for _ in range(3):
        for p, optimizer in zip((trained, plain), optimizers, strict=True):
            p.grad = torch.ones(8, 6).tril()
            optimizer.step()
    assert torch.equal(trained, plain) and lr == 0.25


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"projection": "columns"}, {"state_dtype": "int8"}])
def test_the_default_dtype_of_torch_decides_nothing(default, settings, monkeypatch):
    starts = [weight(shape).detach() for shape in [(24, 16), (5,)]]

    def train():
        p, vector = (torch.nn.Parameter(start.clone()) for start in starts)
        optimizer = FiraAdamW([{"params": [p], "rank": 4, "update_proj_gap": 2, **settings}, {"params": [vector]}])
        for step in range(5):
            p.grad = torch.ones(24, 16, dtype=torch.float32).tril(step)
            vector.grad = torch.ones(5, dtype=torch.float32)
            optimizer.step()
        return [p, vector, *(x for of in optimizer.state.values() for x in of.values() if torch.is_tensor(x))]

    expected, inside, inner = train(), [], F.are_usable
    # Other threads see the default as well: it is left alone during a step, too.
    monkeypatch.setattr(F, "are_usable", lambda *args: (inside.append(torch.get_default_dtype()), inner(*args))[1])
    torch.set_default_dtype(default)
    try:
        found = train()
        assert set(inside) == {default}
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_the_training_arguments_may_hold_numbers_of_numpy(tmp_path):
    # 0.25 and 0.5 are the same numbers in fp32.
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), optim="fira", optim_args="rank=4"))
    args.learning_rate, args.weight_decay = np.float32(0.25), torch.tensor(0.5)
    args.adam_beta1, args.adam_beta2, args.adam_epsilon = np.float64(0.5), np.float32(0.75), Fraction(1, 2)
    config = config_from_args(args, build_llama())
    assert same((config.lr, config.weight_decay, config.betas, config.eps), (0.25, 0.5, (0.5, 0.75), 0.5))
    assert json.dumps(config.to_dict())


# --------------------------------------------------------------------------- sequences and mappings


class Names(collections.abc.Sequence):
    """A sequence that is no list, as OmegaConf's ListConfig."""

    def __init__(self, *entries):
        self.entries = entries

    def __getitem__(self, index):
        return self.entries[index]

    def __len__(self):
        return len(self.entries)


LISTS = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern")


@pytest.mark.parametrize(
    "make",
    [
        *[Names, lambda *entries: entries, lambda *entries: collections.deque(entries), lambda *entries: {*entries}],
        *[lambda *entries: dict.fromkeys(entries).keys(), lambda *entries: np.array(entries)],
    ],
    ids=["sequence", "tuple", "deque", "set", "keys", "numpy"],
)
def test_any_sequence_or_set_is_a_list(make):
    names = ["k_proj", "q_proj"]
    config = FiraConfig(**{name: make(*names) for name in LISTS}, layers_to_transform=make(0, 10, 2))
    assert all(same(getattr(config, name), names) for name in LISTS)
    assert all(type(name) is str for name in config.target_modules)
    assert isinstance(config.layers_to_transform, list) and sorted(config.layers_to_transform) == [0, 2, 10]
    assert all(type(index) is int for index in config.layers_to_transform)
    # One name in a list is still a list: a string would be a regular expression.
    assert FiraConfig(target_modules=make("q_proj")).target_modules == ["q_proj"]
    assert FiraConfig(layers_to_transform=range(2)).layers_to_transform == [0, 1]
    assert json.dumps(config.to_dict())


def test_any_mapping_is_a_dict_and_a_pair_may_be_any_sequence():
    pattern = types.MappingProxyType({"down_proj": np.int64(4), ".*": 2})
    config = FiraConfig(rank_pattern=pattern, alpha_pattern=collections.ChainMap({"q": 0.5}), betas=Names(0.5, 0.75))
    assert list(config.rank_pattern.items()) == [("down_proj", 4), (".*", 2)]
    assert same(config.rank_pattern, {"down_proj": 4, ".*": 2}) and same(config.alpha_pattern, {"q": 0.5})
    assert config.betas == FiraConfig(betas=np.array([0.5, 0.75])).betas == (0.5, 0.75)


@pytest.mark.parametrize("value", [{"q_proj", 3}, Names("q_proj", 3), Names(), (n for n in ["q_proj"]), b"q_proj"])
def test_a_sequence_of_something_else_is_refused_in_words(value):
    with pytest.raises(ValueError, match="^exclude_modules=.* is not valid: exclude_modules must be"):
        FiraConfig(exclude_modules=value)


def test_what_the_config_keeps_is_its_own():
    names, pattern = ["q_proj"], {"q_proj": 4}
    config = FiraConfig(target_modules=names, rank_pattern=pattern)
    names.append("k_proj"), pattern.update(k_proj=2)
    assert config == FiraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 4})


def test_omegaconf_is_taken_as_lists_and_dicts_are():
    omegaconf = pytest.importorskip("omegaconf", reason="is not among the test dependencies; Names stands for it")
    given = omegaconf.OmegaConf.create({"target_modules": ["q_proj"], "rank_pattern": {"q": 4}, "betas": [0.5, 0.75]})
    assert FiraConfig(**given) == FiraConfig(target_modules=["q_proj"], rank_pattern={"q": 4}, betas=(0.5, 0.75))


# --------------------------------------------------------------------------- optim_args


EXPECTED = {"rank": 8, "alpha": 0.25, "gamma": None, "correct_bias": True, "projection": "svd"}


@pytest.mark.parametrize(
    "given",
    [
        "rank=8, alpha=0.25, gamma=none, correct_bias=true, projection=svd",
        ["rank=8", " alpha = 0.25 ", "gamma=none", "correct_bias=true", "projection=svd"],
        Names("rank=8, alpha=0.25", "gamma=none", "correct_bias=true", "projection=svd"),
        EXPECTED,
        types.MappingProxyType(EXPECTED),
        dict(zip(EXPECTED, ("8", "0.25", "none", "true", "svd"), strict=True)),
    ],
    ids=["text", "list", "sequence", "dict", "mapping", "dict of text"],
)
def test_optim_args_as_text_list_or_mapping(given):
    settings = parse_optim_args(given)
    assert settings == EXPECTED and list(map(type, settings.values())) == list(map(type, EXPECTED.values()))


@pytest.mark.parametrize("given", [None, "", " ", [], {}, Names()])
def test_no_optim_args(given):
    assert parse_optim_args(given) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (8, r"optim_args=8 .*'rank=128, alpha=0.25'.*list.*mapping"),
        (["rank=8", 3], "optim_args=.*: '3' is not of the form key=value"),
        (["rank=8", "rank=4"], "rank is given twice"),
        (["rank"], "'rank' is not of the form key=value"),
        (["rnak=8"], "Unknown key 'rnak'. Did you mean 'rank'"),
        ({"rnak": 8}, "Unknown key 'rnak'. Did you mean 'rank'"),
        ({3: 8}, "Unknown key '3'"),
        ({"rank": "eight"}, "rank='eight' is not an integer"),
        ("rank=8 alpha=0.25", "rank='8 alpha=0.25' is not an integer. Commas separate"),
        ("scale=0.25", "'scale'. It is called 'alpha' here"),
        ({"lr": 1e-3}, "set lr by TrainingArguments' learning_rate"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern does not fit.*config=PATH"),
        ({"preset": "publshed"}, "Unknown preset 'publshed'. Did you mean 'published'"),
        ({"preset": None}, "Unknown preset"),
    ],
    ids=repr,
)
def test_optim_args_of_every_kind_are_strict(given, words):
    with pytest.raises(ValueError, match=words):
        parse_optim_args(given)


def test_values_of_a_mapping_are_checked_as_those_of_the_config(tmp_path):
    settings = trainer_settings(output_dir=str(tmp_path), optim="fira", optim_args={"rank": np.int64(4), "alpha": 1})
    args = TrainingArguments(**settings)
    assert same(config_from_args(args, build_llama()).rank, 4)
    args.optim_args = {"rank": 2.5}
    with pytest.raises(ValueError, match="rank=2.5 is not valid"):
        config_from_args(args, build_llama())
    FiraConfig(rank=2).save_pretrained(tmp_path)
    args.optim_args = {"config": tmp_path, "alpha": 0.5}
    assert config_from_args(args, build_llama()).rank == 2


@pytest.mark.parametrize("make", [Names, lambda *entries: entries])
def test_optim_target_modules_may_be_any_sequence(make, tmp_path):
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), optim="fira"))
    model = build_llama()
    args.optim_target_modules = make("q_proj", "mlp")
    found = config_from_args(args, model)
    args.optim_target_modules = ["q_proj", "mlp"]
    assert found == config_from_args(args, model)
    for wrong in (make(), make(3), 3, make("")):
        args.optim_target_modules = wrong
        with pytest.raises(ValueError, match="optim_target_modules=.* must be"):
            config_from_args(args, model)


def test_every_setting_has_a_rule():
    assert set(FiraConfig.__dataclass_fields__) <= set(RULES)
