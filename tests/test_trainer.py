"""`optim="fira"` in TrainingArguments: the name, its round trips and its `optim_args`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import fira_hf
from conftest import build_llama, run_quietly, trainer_settings
from fira_hf import PUBLISHED, FiraAdamW, FiraConfig, get_fira_optimizer


def fira_args(tmp_path, **arguments) -> TrainingArguments:
    return TrainingArguments(**trainer_settings(output_dir=str(tmp_path / "run"), optim="fira", **arguments))


def created(make_trainer, **arguments) -> FiraAdamW:
    return make_trainer(optim="fira", **arguments).create_optimizer()


# --------------------------------------------------------------------------- the name


def test_the_name_is_a_member_of_the_enum():
    member = OptimizerNames("fira")
    assert isinstance(member, OptimizerNames)
    assert member == "fira" and member.value == "fira"
    assert member in list(OptimizerNames)
    assert [each.value for each in OptimizerNames].count("fira") == 1
    assert OptimizerNames[member.name] is member
    assert OptimizerNames(member) is member


def test_a_misspelt_optimizer_lists_fira_among_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="'fira'"):
        TrainingArguments(output_dir=str(tmp_path), optim="firra")


def test_register_a_second_time_changes_nothing(make_trainer):
    names, function = list(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs
    fira_hf.register()
    assert list(OptimizerNames) == names
    assert Trainer.get_optimizer_cls_and_kwargs is function
    assert isinstance(created(make_trainer, optim_args="rank=8"), FiraAdamW)


def test_constructor_and_set_optimizer_mean_the_same(tmp_path, make_trainer):
    args = fira_args(tmp_path, optim_args="rank=8", learning_rate=3e-4, weight_decay=0.1, adam_beta2=0.95)
    other = TrainingArguments(**trainer_settings(output_dir=str(tmp_path / "run"))).set_optimizer(
        "fira", learning_rate=3e-4, weight_decay=0.1, beta2=0.95, args="rank=8"
    )
    assert args.optim is other.optim is OptimizerNames("fira")
    groups = []
    for each in (args, other):
        trainer = make_trainer()
        trainer.args = each
        groups.append([{k: v for k, v in g.items() if k != "params"} for g in trainer.create_optimizer().param_groups])
    assert groups[0] == groups[1]


# --------------------------------------------------------------------------- round trips


def same(left: TrainingArguments, right: TrainingArguments) -> bool:
    return left.to_dict() == right.to_dict() and left.optim is right.optim


def test_dict_and_json(tmp_path):
    args = fira_args(tmp_path, optim_args="rank=8, gamma=none", optim_target_modules=["attn"])
    assert args.to_dict()["optim"] == "fira"
    assert json.loads(args.to_json_string())["optim"] == "fira"
    assert args.to_sanitized_dict()["optim"] == "fira"
    again = TrainingArguments(
        **trainer_settings(**{k: args.to_dict()[k] for k in ("output_dir", "optim", "optim_args")})
    )
    assert again.optim is args.optim and again.optim_args == "rank=8, gamma=none"


def test_copies(tmp_path):
    args = fira_args(tmp_path, optim_args="rank=8")
    assert same(copy.copy(args), args)
    assert same(copy.deepcopy(args), args)
    assert dataclasses.replace(args, learning_rate=1.0).optim is args.optim


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_in_this_process(tmp_path, protocol):
    args = fira_args(tmp_path, optim_args="rank=8")
    assert same(pickle.loads(pickle.dumps(args, protocol=protocol)), args)


FRESH_PROCESS = """
import json, pickle, sys, torch
from conftest import build_llama, build_tokens, trainer_settings
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

folder = sys.argv[1]
args = TrainingArguments(**trainer_settings(output_dir=folder, optim="adamw_torch", weight_decay=0.1))
trainer = Trainer(model=build_llama(), args=args, train_dataset=build_tokens())
trainer.train()
torch.save(trainer.model.state_dict(), f"{folder}/adamw.pt")
untouched = "fira_hf" not in sys.modules and "fira" not in [name.value for name in OptimizerNames]

with open(f"{folder}/args.pickle", "rb") as file:
    first = pickle.load(file)
second = torch.load(f"{folder}/training_args.bin", weights_only=False)
assert first.optim is second.optim is OptimizerNames("fira")
assert TrainingArguments(output_dir=folder, optim="fira", use_cpu=True, report_to="none").optim is first.optim
optimizers = [Trainer(model=build_llama(), args=each).create_optimizer() for each in (first, second)]
with open(f"{folder}/result.json", "w") as file:
    json.dump({"untouched": untouched, "ranks": [each.param_groups[0]["rank"] for each in optimizers]}, file)
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory) -> Path:
    """Files of a process that trains with AdamW without the library, then opens pickled arguments of optim="fira"."""
    folder = tmp_path_factory.mktemp("fresh")
    args = fira_args(folder, optim_args="rank=8")
    (folder / "args.pickle").write_bytes(pickle.dumps(args))
    torch.save(args, folder / "training_args.bin")  # as the Trainer writes it
    code, _, err = run_quietly(FRESH_PROCESS, folder, str(folder))
    assert code == 0, err
    return folder


def test_pickle_in_a_process_that_has_not_imported_the_library(fresh_process):
    """A job queue or a spawned worker unpickles the arguments before any of the user's imports ran."""
    result = json.loads((fresh_process / "result.json").read_text())
    assert result == {"untouched": True, "ranks": [8, 8]}


def test_command_line(tmp_path):
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --optim fira --optim_args rank=8,alpha=0.5 --use_cpu true --report_to none".split()
    )
    assert args.optim is OptimizerNames("fira")
    assert args.optim_args == "rank=8,alpha=0.5"


def test_parsers_of_dicts_and_files(tmp_path):
    settings = trainer_settings(
        output_dir=str(tmp_path), optim="fira", optim_args="rank=8", optim_target_modules=["mlp"]
    )
    (tmp_path / "args.json").write_text(json.dumps(settings))
    (tmp_path / "args.yaml").write_text(json.dumps(settings))  # JSON is YAML
    parser = HfArgumentParser(TrainingArguments)
    for (args,) in (
        parser.parse_dict(settings),
        parser.parse_json_file(str(tmp_path / "args.json")),
        parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ):
        assert (args.optim, args.optim_args, args.optim_target_modules) == (OptimizerNames("fira"), "rank=8", ["mlp"])


# --------------------------------------------------------------------------- the Trainer around it


def test_other_optimizers_are_not_touched(make_trainer, fresh_process):
    """The same run in a process that has not imported the library ends in the same bits."""
    trainer = make_trainer(optim="adamw_torch", weight_decay=0.1)
    trainer.train()
    other = torch.load(fresh_process / "adamw.pt", weights_only=True)
    mine = trainer.model.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize(("optim", "kind"), [("adamw_torch", "AdamW"), ("sgd", "SGD"), ("adafactor", "Adafactor")])
def test_other_optimizers_give_what_they_gave(make_trainer, optim, kind):
    assert type(make_trainer(optim=optim).create_optimizer()).__name__ == kind


def test_subclasses_of_the_trainer(tmp_path, make_trainer):
    class Own(Trainer):
        """Has another idea of what decays, and looks at the optimizer class on its way."""

        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if "q_proj" in name]

        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
            assert issubclass(optimizer_cls, FiraAdamW)
            return optimizer_cls, kwargs

    trainer = make_trainer(trainer_class=Own, optim="fira", optim_args="rank=8", weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, FiraAdamW)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(p) for name, p in trainer.model.named_parameters() if "q_proj" in name}

    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), optim="fira", optim_args="rank=8", use_cpu=True, report_to="none"
    )
    assert isinstance(Seq2SeqTrainer(model=build_llama(), args=args).create_optimizer(), FiraAdamW)


def test_the_method_works_as_transformers_calls_it(tmp_path, make_trainer):
    """It is a static method: on the class, on an instance, by position and by keyword."""
    trainer, args, model = make_trainer(), fira_args(tmp_path, optim_args="rank=8"), build_llama()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    for method in (Trainer.get_optimizer_cls_and_kwargs, trainer.get_optimizer_cls_and_kwargs):
        for optimizer_cls, kwargs in (method(args, model), method(args=args, model=model)):
            assert isinstance(optimizer_cls(groups, **kwargs), FiraAdamW)


def test_without_a_model_the_error_says_so(tmp_path):
    with pytest.raises(ValueError, match="model"):
        Trainer.get_optimizer_cls_and_kwargs(fira_args(tmp_path, optim_args="rank=8"))


def test_hand_passed_optimizers(make_trainer):
    model = build_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=8, lr=1e-2))
    by_hand = make_trainer(model, optimizers=(optimizer, None))
    by_name = make_trainer(optim="fira", optim_args="rank=8", adam_epsilon=1e-6)
    by_hand.train(), by_name.train()
    for one, other in zip(by_hand.model.parameters(), by_name.model.parameters(), strict=True):
        assert torch.equal(one, other)


FSDP1 = {"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 1}}
FSDP2 = {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}, "fsdp_config": {}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "does not run under DeepSpeed"),
        (FSDP1, "does not run under FSDP1"),
        (FSDP2 | {"fsdp_config": {"xla": True}}, "does not run under XLA's FSDP, which .*: use FSDP2"),
        (FSDP2 | {"optim": "fira_layerwise"}, 'set optim="fira"'),
        (FSDP2 | {"optim_args": "preset=published"}, "projection=power in optim_args"),
    ],
)
def test_engines_that_cannot_work_are_refused(tmp_path, settings, words):
    args = fira_args(tmp_path, optim_args="rank=8")
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=words):
        Trainer.get_optimizer_cls_and_kwargs(args, build_llama())


def test_deepspeed_is_refused_where_it_makes_the_optimizer_itself(make_trainer):
    """As where its configuration has an optimizer: then the Trainer asks nobody which one is wanted."""
    trainer = make_trainer(optim="fira", optim_args="rank=8")
    trainer.create_optimizer = lambda *_: pytest.fail("training began")
    trainer.args.deepspeed = {"optimizer": {"type": "AdamW"}}
    with pytest.raises(ValueError, match="does not run under DeepSpeed"):
        trainer.train()


@pytest.mark.parametrize(("version", "refused"), [(None, True), ("1", True), ("2", False)])
def test_of_what_accelerate_launch_says_only_fsdp2_is_taken(tmp_path, monkeypatch, version, refused):
    args = fira_args(tmp_path, optim_args="rank=8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match="FSDP1") if refused else contextlib.nullcontext():
        Trainer.get_optimizer_cls_and_kwargs(args, build_llama())


# --------------------------------------------------------------------------- optim_args


def test_optim_args_are_typed(make_trainer):
    optimizer = created(
        make_trainer,
        optim_args="rank=8, update_proj_gap=50, alpha=0.25, gamma=1.1, projection=svd, scaling=matrix, residual=paper,"
        "dense_lr=1e-5",
    )
    config = optimizer.config
    assert (config.rank, config.update_proj_gap, config.alpha, config.gamma) == (8, 50, 0.25, 1.1)
    assert (config.projection, config.scaling, config.residual, config.dense_lr) == ("svd", "matrix", "paper", 1e-5)
    assert type(config.rank) is int and type(config.update_proj_gap) is int
    group = optimizer.param_groups[0]
    assert (group["rank"], group["update_proj_gap"], group["alpha"], group["gamma"]) == (8, 50, 0.25, 1.1)
    assert (group["scaling"], group["residual"]) == ("matrix", "paper")
    assert {g["lr"] for g in optimizer.param_groups if "rank" not in g} == {1e-5}


@pytest.mark.parametrize(
    ("given", "named"), [({"adam_beta1": 1.0}, "adam_beta1 and adam_beta2"), ({"adam_epsilon": -1.0}, "adam_epsilon")]
)
def test_what_the_trainers_own_settings_get_wrong_is_said_in_their_names(make_trainer, given, named):
    with pytest.raises(ValueError, match=f"TrainingArguments' {named}: .* is not valid"):
        created(make_trainer, **given)


@pytest.mark.parametrize("optim_args", [None, ""])
def test_without_optim_args_the_defaults_hold(make_trainer, optim_args):
    config = created(make_trainer, optim_args=optim_args).config
    default = FiraConfig()
    for name in VALID[:-1]:
        assert getattr(config, name) == getattr(default, name)


def test_the_published_preset(make_trainer):
    """Further keys override it."""
    config = created(make_trainer, optim_args="preset=published, rank=8, update_proj_gap=25").config
    assert {name: getattr(config, name) for name in PUBLISHED} == {**PUBLISHED, "update_proj_gap": 25}
    assert config.rank == 8
    with pytest.raises(ValueError, match="'publish'.*'published'"):
        created(make_trainer, optim_args="preset=publish")
    with pytest.raises(ValueError, match="preset and config"):
        created(make_trainer, optim_args="preset=published, config=out")


@pytest.mark.parametrize("word", ["none", "None"])
def test_the_limiter_can_be_switched_off(make_trainer, word):
    optimizer = created(make_trainer, optim_args=f"rank=8,gamma={word}")
    assert optimizer.config.gamma is None and optimizer.param_groups[0]["gamma"] is None


def test_the_arguments_of_the_trainer_reach_the_config(make_trainer):
    optimizer = created(
        make_trainer,
        optim_args="rank=8",
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
    )
    config = optimizer.config
    assert (config.lr, config.weight_decay, tuple(config.betas), config.eps) == (3e-4, 0.1, (0.8, 0.95), 1e-5)


def test_a_key_given_twice_is_refused(make_trainer):
    with pytest.raises(ValueError, match="rank"):
        created(make_trainer, optim_args="rank=8, rank=16")


VALID = ("rank", "alpha", "update_proj_gap", "gamma", "projection", "refresh", "moments", "scaling", "residual")
VALID += ("state_dtype", "stochastic_rounding", "dense_lr", "config")


@pytest.mark.parametrize(
    ("key", "nearest"), [("rnak", "rank"), ("update_gap", "update_proj_gap"), ("scale", "alpha"), ("Rank", "rank")]
)
def test_an_unknown_key_lists_the_valid_ones(make_trainer, key, nearest):
    with pytest.raises(ValueError) as refused:
        created(make_trainer, optim_args=f"rank=8, {key}=4")
    message = str(refused.value)
    assert repr(key) in message or f"{key}=" in message
    assert all(valid in message for valid in VALID)
    # the nearest is named apart from the list
    assert message.count(nearest) >= 2


@pytest.mark.parametrize(
    "optim_args",
    [
        "rank",
        "rank=",
        "rank=abc",
        "rank=2.5",
        "rank=8,,",
        "rank=8,",
        ",rank=8",
        "=8",
        "rank==8",
        "rank=8;alpha=1.0",
        "rank=8 alpha=1.0",
        "rank=0",
        "rank=-4",
        "update_proj_gap=0",
        "update_proj_gap=1.5",
        "alpha=-1",
        "alpha=nan",
        "alpha=none",
        "gamma=0.5",
        "gamma=off",
        "scaling=row",
        "residual=code",
        "projection=qr",
        "dense_lr=-1",
        "config=",
    ],
)
def test_a_malformed_value_is_named(make_trainer, optim_args):
    with pytest.raises(ValueError) as refused:
        created(make_trainer, optim_args=optim_args)
    message = str(refused.value)
    key, _, value = optim_args.strip(",").partition("=")
    assert "optim_args" in message or key in message
    assert value.rstrip(",") in message


@pytest.mark.parametrize(
    ("key", "argument"),
    [
        ("lr", "learning_rate"),
        ("weight_decay", "weight_decay"),
        ("eps", "adam_epsilon"),
        ("betas", "adam_beta"),
        ("target_modules", "optim_target_modules"),
    ],
)
def test_what_belongs_to_training_arguments_is_sent_there(make_trainer, key, argument):
    with pytest.raises(ValueError) as refused:
        created(make_trainer, optim_args=f"rank=8, {key}=0.1")
    message = str(refused.value)
    assert key in message and argument in message and "TrainingArguments" in message


@pytest.mark.parametrize("targets", ["*attn*", ["*attn*"]])
def test_a_glob_is_no_regular_expression(make_trainer, targets):
    with pytest.raises(ValueError, match=r"optim_target_modules: '\*attn\*' is no regular expression"):
        created(make_trainer, optim_target_modules=targets)


# --------------------------------------------------------------------------- config=PATH


def saved(folder: Path, **settings) -> Path:
    """A saved config that agrees with the tests' TrainingArguments in lr and eps."""
    FiraConfig(**({"rank": 4, "lr": 1e-2, "eps": 1e-8} | settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["", "fira_config.json"], ids=["directory", "file"])
@pytest.mark.parametrize("name", ["plain", "with space", "lr=1e-2 rank=4"])
def test_config_from_a_path(make_trainer, tmp_path, part, name):
    folder = saved(tmp_path / name, update_proj_gap=7, target_modules=["q_proj"], rank_pattern={"layers.0.*": 2})
    optimizer = created(make_trainer, optim_args=f"config={folder / part}")
    assert optimizer.config == FiraConfig.from_pretrained(folder)
    assert sorted(group["rank"] for group in optimizer.param_groups if "rank" in group) == [2, 4]
    assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == 2


@pytest.mark.parametrize("order", ["rank=16, config={}", "config={}, rank=16"])
def test_explicit_keys_override_the_file(make_trainer, tmp_path, order):
    folder = saved(tmp_path / "saved", update_proj_gap=7, alpha=0.5)
    config = created(make_trainer, optim_args=order.format(folder)).config
    assert (config.rank, config.update_proj_gap, config.alpha) == (16, 7, 0.5)


@pytest.mark.parametrize(
    ("in_file", "in_arguments", "named"),
    [
        ({"lr": 5e-4}, {"learning_rate": 1e-2}, "learning_rate"),
        ({"weight_decay": 0.1}, {}, "weight_decay"),
        ({"eps": 1e-5}, {}, "adam_epsilon"),
        ({"betas": (0.9, 0.95)}, {}, "adam_beta2"),
        ({"target_modules": ["q_proj"]}, {"optim_target_modules": ["k_proj"]}, "optim_target_modules"),
        ({"target_modules": ["q_proj"]}, {"optim_target_modules": "all-linear"}, "optim_target_modules='all-linear'"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_file_that_contradicts_the_arguments_is_refused(make_trainer, tmp_path, in_file, in_arguments, named):
    folder = saved(tmp_path / "saved", **in_file)
    with pytest.raises(ValueError, match=named):
        created(make_trainer, optim_args=f"config={folder}", **in_arguments)


def test_values_that_the_file_leaves_at_their_defaults_do_not_contradict(make_trainer, tmp_path):
    """save_pretrained writes every field, also those that nobody chose."""
    FiraConfig(rank=4).save_pretrained(tmp_path)
    optimizer = created(
        make_trainer, optim_args=f"config={tmp_path}", learning_rate=3e-4, optim_target_modules=["k_proj"]
    )
    assert (optimizer.config.rank, optimizer.config.lr, optimizer.config.eps) == (4, 3e-4, 1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == 2


def test_the_same_targets_in_the_file_and_in_the_arguments_agree(make_trainer, tmp_path):
    folder = saved(tmp_path / "saved", target_modules=["self_attn.q_proj"])
    optimizer = created(make_trainer, optim_args=f"config={folder}", optim_target_modules=["q_proj"])
    assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == 2


def test_a_file_that_is_silent_on_the_rates_takes_the_arguments(make_trainer, tmp_path):
    (tmp_path / "fira_config.json").write_text('{"rank": 4}')
    config = created(make_trainer, optim_args=f"config={tmp_path}", learning_rate=3e-4, weight_decay=0.1).config
    assert (config.rank, config.lr, config.weight_decay) == (4, 3e-4, 0.1)


@pytest.mark.parametrize(
    "content", [None, "{", '{"rnak": 4}', '{"rank": 0}'], ids=["missing", "no JSON", "unknown", "bad"]
)
def test_a_path_that_cannot_be_read_is_named(make_trainer, tmp_path, content):
    folder = tmp_path / "saved"
    if content is not None:
        folder.mkdir()
        (folder / "fira_config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="saved|rnak|rank"):
        created(make_trainer, optim_args=f"config={folder}")
