"""`Trainer.hyperparameter_search`, which sets the arguments of a trial and a new accelerator inside `train`."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from conftest import build_llama
from trials import search

SETTINGS = {"optim_args": "rank=4, update_proj_gap=3", "max_grad_norm": 1e9, "max_steps": 3}


class Look(TrainerCallback):
    """Whether backward left gradients for `optimizer.step()`."""

    def __init__(self):
        self.are_left = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.are_left = any(p.grad is not None for p in model.parameters())


def run_of(trainer) -> tuple:
    """How a trial went, and what it leaves behind."""
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    (look,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Look))
    left = {name for name in vars(trainer.accelerator) if name in ("clip_grad_norm_", "prepare_model")}
    return weights, [(e["grad_norm"], e["learning_rate"]) for e in entries], look.are_left, left


def searched(make_trainer, trials, **arguments):
    trainer = make_trainer(model_init=lambda: build_llama(), callbacks=[Look()], **(SETTINGS | arguments))
    known, attributes = len(trainer.callback_handler.callbacks), set(vars(trainer))
    runs = search(trainer, trials, run_of)
    assert len(trainer.callback_handler.callbacks) == known
    assert not [name for name in vars(trainer).keys() - attributes if "loop" in name]
    return runs


def alone(make_trainer, **arguments):
    trainer = make_trainer(model_init=lambda: build_llama(), callbacks=[Look()], **(SETTINGS | arguments))
    trainer.train()
    return run_of(trainer)


def assert_same_run(run, other):
    assert torch.equal(run[0], other[0])
    assert run[1:3] == other[1:3]
    assert not run[3] and all(norm > 0 for norm, _ in run[1])


def test_layerwise_trials_are_those_of_single_trainings(make_trainer):
    rates = [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}]
    runs = searched(make_trainer, rates, optim="fira_layerwise")
    for run, rate in zip(runs, rates, strict=True):
        assert_same_run(run, alone(make_trainer, optim="fira_layerwise", **rate))
    assert [run[2] for run in runs] == [False, False]


def test_the_optimizer_can_be_searched(make_trainer):
    names = ["fira_layerwise", "adamw_torch", "fira", "fira_layerwise"]
    runs = searched(make_trainer, [{"optim": name} for name in names], optim="adamw_torch")
    assert [run[2] for run in runs] == [False, True, True, False]
    for run, name in zip(runs, names, strict=True):
        assert_same_run(
            run, alone(make_trainer, optim=name, optim_args=None if "adamw" in name else SETTINGS["optim_args"])
        )
