"""What `Trainer.get_optimizer_cls_and_kwargs` gives for optim="fira", read and changed as that of any optimizer."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from conftest import build_llama, trainer_settings
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer

SETTINGS = {"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1}
FIRA = {"optim": "fira", "optim_args": "rank=4"}


def given(tmp_path, model, **arguments):
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), **(SETTINGS | FIRA | arguments)))
    return Trainer.get_optimizer_cls_and_kwargs(args, model)


def lora():
    return get_peft_model(build_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("optim", ["fira", "fira_layerwise"])
def test_they_can_be_read_as_with_adamw(tmp_path, optim):
    _, kwargs = given(tmp_path, build_llama(), optim=optim)
    _, of_adamw = given(tmp_path, build_llama(), optim="adamw_torch", optim_args=None)
    assert {name: kwargs[name] for name in ("lr", "betas", "eps")} == {
        name: of_adamw[name] for name in ("lr", "betas", "eps")
    }
    # these names the Trainer takes out, to use them otherwise
    assert not kwargs.keys() & {"params", "model", "optimizer_dict"}


CHANGES = {"lr": 7e-3, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.3}


@pytest.mark.parametrize("changed", [{name: value} for name, value in CHANGES.items()] + [CHANGES], ids=str)
def test_what_is_changed_is_honoured(make_trainer, changed):
    class Own(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
            kwargs.update(changed)
            return optimizer_cls, kwargs

    trainer = make_trainer(trainer_class=Own, **SETTINGS, **FIRA)
    optimizer = trainer.create_optimizer()
    expected = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1} | changed
    assert {name: getattr(optimizer.config, name) for name in expected} == expected
    for group in optimizer.param_groups:
        assert {name: group[name] for name in ("lr", "betas", "eps")} == {
            name: expected[name] for name in ("lr", "betas", "eps")
        }
    # the Trainer's groups have a weight decay of their own, as with adamw_torch
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_groups_of_ones_own_take_what_they_do_not_set(tmp_path):
    model = build_llama()
    optimizer_cls, kwargs = given(tmp_path, model)
    names = ("lr", "betas", "eps", "weight_decay")
    for changed in ({}, CHANGES):
        optimizer = optimizer_cls(model.parameters(), **(kwargs | changed))
        expected = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1} | changed
        assert all({name: group[name] for name in names} == expected for group in optimizer.param_groups)
    for name in ("lr", "betas", "eps"):
        kwargs.pop(name)
    assert optimizer_cls(model.parameters(), **kwargs).param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("betas", (0.9, 1.5)), ("eps", "1e-8")])
def test_a_value_that_is_not_valid_is_named(tmp_path, name, value):
    model = build_llama()
    optimizer_cls, kwargs = given(tmp_path, model)
    with pytest.raises(ValueError, match=name):
        optimizer_cls(model.parameters(), **(kwargs | {name: value}))


def test_peft_makes_groups_with_two_rates(tmp_path):
    """A is trained at lr, B at a multiple of it; both are projected."""
    model = lora()
    optimizer_cls, kwargs = given(tmp_path, model)
    kwargs["lr"] = 2e-3
    optimizer = create_loraplus_optimizer(model, optimizer_cls, loraplus_lr_ratio=16, **kwargs)
    assert isinstance(optimizer, FiraAdamW)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"] if "rank" in g}
    assert len(rates) == 8 == len([p for p in model.parameters() if p.requires_grad])
    assert all(rate == (2e-3 if "lora_A" in name else 16 * 2e-3) for name, rate in rates.items())


def test_the_trainer_trains_with_the_pair_itself(make_trainer):
    """`optimizer_cls_and_kwargs`, with another rate, is the training with that rate."""
    runs = []
    for rate, learning_rate in ((5e-3, 3e-3), (None, 5e-3)):
        model = build_llama()
        by_name = make_trainer(model, **(SETTINGS | FIRA | {"learning_rate": learning_rate}))
        if rate is not None:
            optimizer_cls, kwargs = by_name.get_optimizer_cls_and_kwargs(by_name.args, model)
            by_name.optimizer_cls_and_kwargs = (optimizer_cls, kwargs | {"lr": rate})
        by_name.train()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


# --------------------------------------------------------------------------- nothing is projected


def warnings_of(caplog, make):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fira_hf"):
        make()
    return [record.getMessage() for record in caplog.records if record.name.startswith("fira_hf")]


def test_an_optimizer_that_projects_nothing_says_so(caplog, make_trainer):
    model = lora()
    makers = [
        lambda: FiraAdamW(model.parameters()),
        lambda: create_loraplus_optimizer(model, FiraAdamW, lr=1e-3, loraplus_lr_ratio=16),
        lambda: Trainer(
            model=model, args=make_trainer().args, optimizer_cls_and_kwargs=(FiraAdamW, {"lr": 1e-3})
        ).create_optimizer(),
    ]
    for make in makers:
        (said,) = warnings_of(caplog, make)
        assert "rank" in said and "get_fira_optimizer" in said and "AdamW" in said


def test_one_that_projects_something_is_quiet(caplog, tmp_path):
    model = lora()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer_cls, kwargs = given(tmp_path, model, optim_args="rank=2")
    makers = [
        lambda: get_fira_optimizer(model, FiraConfig(rank=2)),
        lambda: FiraAdamW([{"params": weights[:1]}, {"params": weights[1:], "rank": 4}]),
        lambda: create_loraplus_optimizer(model, optimizer_cls, loraplus_lr_ratio=16, **kwargs),
    ]
    assert [warnings_of(caplog, make) for make in makers] == [[], [], []]
