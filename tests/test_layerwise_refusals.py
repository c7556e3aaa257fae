"""What `optim="fira_layerwise"` and `step_in_backward` refuse, or say that it has no effect."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from torch.nn.utils import parameters_to_vector
from transformers import Trainer, TrainingArguments

from conftest import build_llama, trainer_settings
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.layerwise import step_in_backward
from fira_hf.trainer import Layerwise
from test_layerwise import NAME, SETTINGS, assert_same_model, batches, trained


def test_fp16_is_refused(make_trainer):
    trainer = make_trainer(optim=NAME, fp16=True)
    with pytest.raises(ValueError, match=r"fp16=True.*bf16=True"):
        trainer.train()


def test_a_scaler_of_ones_own_is_noticed():
    model, tokens = build_llama(), batches(1)[0]
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
    step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=tokens, labels=tokens).loss).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


def test_a_sparse_gradient_is_named():
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 16))
    step_in_backward(get_fira_optimizer(model, FiraConfig(rank=4)))
    with pytest.raises(RuntimeError, match="sparse=False in the embedding"):
        model(torch.tensor([1, 2, 3])).square().sum().backward()


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP"])
def test_engines_that_shard_weights_are_refused(tmp_path, engine, monkeypatch):
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), optim=NAME))
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(ValueError, match=f"{NAME}.*{engine}"):
        Trainer.get_optimizer_cls_and_kwargs(args, build_llama())


def test_sharded_weights_are_refused():
    class Sharded(nn.Parameter):
        device_mesh = None

    with pytest.raises(ValueError, match="sharded"):
        step_in_backward(FiraAdamW([Sharded(torch.ones(2, 2))]))


def test_weights_that_another_optimizer_steps_are_refused():
    """As where a cell of a notebook runs twice: the first one's hooks would step them, and free their gradients."""
    model, tokens = build_llama(), batches(1)[0]
    hooks = step_in_backward(get_fira_optimizer(model, FiraConfig(rank=4)))
    second = get_fira_optimizer(model, FiraConfig(rank=4))
    with pytest.raises(ValueError, match=r"Another optimizer steps these weights.*remove\(\)"):
        step_in_backward(second)
    hooks.remove()
    step_in_backward(second)
    model(input_ids=tokens, labels=tokens).loss.backward()
    second.step()


def test_an_optimizer_that_was_dropped_is_not_in_the_way():
    """Whether or not Python has collected it yet."""
    model = build_llama()
    gc.disable()
    try:
        for _ in range(2):
            optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
            step_in_backward(optimizer)
            del optimizer
    finally:
        gc.enable()


def test_a_loop_that_is_not_the_trainers_is_told_what_to_call(tmp_path):
    model, tokens = build_llama(), batches(1)[0]
    args = TrainingArguments(**trainer_settings(output_dir=str(tmp_path), optim=NAME, optim_args="rank=4"))
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls([{"params": list(model.parameters())}], **settings)
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = parameters_to_vector(model.parameters()).clone()
    with pytest.raises(RuntimeError, match=r"step_in_backward\(optimizer\)"):
        optimizer.step()
    assert torch.equal(parameters_to_vector(model.parameters()), before)
    optimizer.zero_grad()
    step_in_backward(optimizer)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(parameters_to_vector(model.parameters()), before)


def test_another_optimizer_is_refused(make_trainer):
    model = build_llama()
    trainer = make_trainer(model, optim=NAME, optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(ValueError, match="SGD"):
        trainer.train()


def test_clipping_says_that_it_has_no_effect(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="fira_hf"):
        clipped = trained(make_trainer, NAME, max_grad_norm=0.05)
        (record,) = [r for r in caplog.records if "max_grad_norm" in r.getMessage()]
        assert "0.05" in record.getMessage() and "no effect" in record.getMessage()
        assert "max_grad_norm=0" in record.getMessage()
        caplog.clear()
        unclipped = trained(make_trainer, NAME, max_grad_norm=0)
        assert not [r for r in caplog.records if "max_grad_norm" in r.getMessage()]
    assert_same_model(clipped.model, unclipped.model)


def test_a_compiled_backward_saves_nothing_and_that_is_said(make_trainer, caplog):
    trainer = make_trainer(optim=NAME, optim_args="rank=4", max_grad_norm=0)
    trainer.args.torch_compile = True  # of which nothing is compiled here
    with caplog.at_level(logging.WARNING), Layerwise(trainer):
        pass
    assert "saves no gradients with torch_compile=True" in caplog.text


def test_a_second_gradient_before_the_step_is_an_error():
    model, tokens = build_llama(), batches(1)[0]
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
    step_in_backward(optimizer)
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match="when="):
        model(input_ids=tokens, labels=tokens).loss.backward()


def test_reentrant_checkpointing_of_a_shared_weight_is_an_error():
    """Its gradient comes in parts, each in a backward pass of its own."""
    layer = nn.Linear(8, 8)

    def loss(use_reentrant):
        x = torch.ones(2, 8, requires_grad=True)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        return x.square().sum()

    optimizer = FiraAdamW([{"params": [layer.weight], "rank": 4}, {"params": [layer.bias]}])
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(use_reentrant=True).backward()
    with pytest.raises(RuntimeError, match="broken off"):
        optimizer.step()
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.param_groups})
    loss(use_reentrant=False).backward()


REFUSED = {"auto_find_batch_size": "per_device_train_batch_size", "enable_jit_checkpoint": "save_steps"}


@pytest.mark.parametrize(("name", "way_out"), REFUSED.items(), ids=REFUSED)
def test_what_would_go_on_from_half_a_step_is_refused(make_trainer, name, way_out):
    if name == "enable_jit_checkpoint" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 5 brings it")
    trainer = make_trainer(optim=NAME, **SETTINGS)
    setattr(trainer.args, name, True)  # in the arguments it would take over SIGTERM
    before = parameters_to_vector(trainer.model.parameters())
    with pytest.raises(ValueError, match=f"{NAME}.*{name}=True.*{way_out}"):
        trainer.train()
    assert torch.equal(parameters_to_vector(trainer.model.parameters()), before)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    setattr(trainer.args, name, False)
    trainer.train()
