"""Optimizers in the wrappers of accelerate and Lightning."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from conftest import build_llama, build_tokens
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer, unwrapped
from fira_hf.layerwise import step_in_backward


def in_accelerate(optimizer):
    return Accelerator(cpu=True).prepare(optimizer)


class InLightning:
    """As Lightning's wrapper of the Trainer: of the wrapped class, forwards what it has not."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("InLightning", (InLightning, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class InFabric:
    """As that of Fabric: of the wrapped class, with a copy of its attributes."""

    def __init__(self, optimizer):
        self.__dict__ = dict(vars(optimizer))
        self.__class__ = type("InFabric", (InFabric, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


WRAPPERS = [
    in_accelerate,
    InLightning,
    InFabric,
    lambda optimizer: in_accelerate(in_accelerate(optimizer)),
    lambda o: o,
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["accelerate", "Lightning", "Fabric", "twice", "none"])
def test_wrapped_optimizers(wrap):
    """Each weight is stepped in backward, and what the optimizer knows is had and set as without the wrapper."""
    runs = []
    for layerwise in (False, True):
        model = build_llama()
        inner = get_fira_optimizer(model, FiraConfig(rank=4, update_proj_gap=2, lr=1e-2))
        optimizer = wrap(inner)
        assert unwrapped(optimizer) is inner
        unwrapped(optimizer).track_statistics = True
        hooks = step_in_backward(optimizer) if layerwise else None
        for row in build_tokens(3):
            tokens = row["input_ids"][None]
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert layerwise == all(p.grad is None for p in model.parameters())
            optimizer.step()
            inner.zero_grad()
        if hooks is not None:
            hooks.remove()
        assert "Fira projects" in unwrapped(optimizer).summary
        assert 0 < unwrapped(optimizer).pop_statistics()["captured_energy"] <= 1
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("hooks_first", [True, False])
def test_a_loop_of_accelerate(tmp_path, hooks_first):
    """With accumulation; a step that was broken off cannot be saved, and `load_state` makes it good."""
    runs = []
    for breaks in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = build_llama()
        optimizer = get_fira_optimizer(model, FiraConfig(rank=4, update_proj_gap=2, lr=1e-2))
        if not hooks_first:
            optimizer = accelerator.prepare(optimizer)
        step_in_backward(optimizer, when=lambda a=accelerator: a.sync_gradients)
        model, optimizer = accelerator.prepare(model, optimizer)

        def train(row, accelerator=accelerator, model=model, optimizer=optimizer):
            tokens = row["input_ids"][None]
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                optimizer.step()
                optimizer.zero_grad()

        def fails(_):
            raise RuntimeError("out of memory")

        first, second = build_tokens(4), build_tokens(4, seed=5)
        for row in first:
            train(row)
        accelerator.save_state(str(tmp_path))
        if breaks:
            train(second[0])
            handle = model.model.layers[0].mlp.up_proj.weight.register_hook(fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                train(second[1])
            handle.remove()
            with pytest.raises(RuntimeError, match="broken off"):
                accelerator.save_state(str(tmp_path / "half"))
            with pytest.raises(RuntimeError, match="broken off"):
                optimizer.step()
            accelerator.load_state(str(tmp_path))
            model.zero_grad()
        for row in second:
            train(row)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


class Closed(nn.Parameter):
    """A weight that takes no hook."""

    def register_post_accumulate_grad_hook(self, hook):
        raise RuntimeError("no hooks here")


def of_another_class(weights):
    return torch.optim.AdamW(weights)


@pytest.mark.parametrize(
    ("wrap", "last", "words"),
    [
        (of_another_class, nn.Parameter, "FiraAdamW.*AdamW"),
        (lambda weights: in_accelerate(torch.optim.SGD(weights)), nn.Parameter, "FiraAdamW.*SGD"),
        (FiraAdamW, Closed, "no hooks"),
    ],
)
def test_a_refusal_leaves_nothing_behind(wrap, last, words):
    weights = [nn.Parameter(torch.ones(2, 2)), last(torch.ones(2, 2))]
    optimizer = wrap(weights)
    with pytest.raises((ValueError, RuntimeError), match=words):
        step_in_backward(optimizer)
    before = [p.detach().clone() for p in weights]
    sum(p.sum() for p in weights).backward()
    assert all(torch.equal(p, b) and p.grad is not None for p, b in zip(weights, before, strict=True))
    optimizer.step()
    assert not [p for p, b in zip(weights, before, strict=True) if torch.equal(p, b)]


def test_a_frozen_weight_is_left_to_step():
    """torch takes no hook on it; when it is trained again, `optimizer.step()` steps it."""
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = FiraAdamW([{"params": weights, "rank": 2}], lr=1e-2)
    weights[0].requires_grad_(False)
    step_in_backward(optimizer)
    weights[0].requires_grad_(True)
    sum(p.sum() for p in weights).backward()
    assert [p.grad is None for p in weights] == [False, True]
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in weights] == [1, 1]


def test_a_second_time_is_an_error():
    """Two sets of hooks would step a weight whose gradient is gone."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = FiraAdamW([{"params": [weight], "rank": 2}])
    hooks = step_in_backward(optimizer)
    with pytest.raises(ValueError, match="remove"):
        step_in_backward(optimizer)
    hooks.remove()
    step_in_backward(optimizer)
    weight.sum().backward()
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 1
