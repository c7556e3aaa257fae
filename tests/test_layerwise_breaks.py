"""What becomes of a step that is broken off inside backward: no run goes on from half of it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.utils.checkpoint
from accelerate import Accelerator
from torch import nn

from conftest import build_llama, build_tokens
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.layerwise import step_in_backward

pytestmark = pytest.mark.usefixtures("held")

NAME = "fira_layerwise"
HALF = "broken off"
SETTINGS = {"optim": NAME, "optim_args": "rank=4, update_proj_gap=3", "max_grad_norm": 0, "max_steps": 6}
OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate")
ERRORS = [OUT_OF_MEMORY, KeyboardInterrupt(), FloatingPointError("the gradient is not a number")]


class Break:
    """Raises when the gradient of a weight in the middle comes for the nth time; before that, it counts."""

    def __init__(self, weight, error, nth=1):
        self.error, self.left = error, nth
        self.handle = weight.register_hook(self)

    def __call__(self, _):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise self.error


def middle(model):
    return model.model.layers[0].mlp.up_proj.weight


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def backward(model, row):
    tokens = row["input_ids"][None]
    model(input_ids=tokens, labels=tokens).loss.backward()


def begun(rows=2, **settings):
    """A model and its optimizer after some whole steps, and what was saved then."""
    model = build_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4, update_proj_gap=2, lr=1e-2))
    hooks = step_in_backward(optimizer, **settings)
    for row in build_tokens(rows):
        backward(model, row)
        optimizer.step()
    return model, optimizer, hooks, copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def broken(model, error, nth=1):
    Break(middle(model), error, nth)
    before = flat(model)
    with pytest.raises(type(error)):
        backward(model, build_tokens(1, seed=5)[0])
    return before


GO_ON = {
    "step": lambda model, optimizer, hooks: optimizer.step(),
    "step after zero_grad": lambda model, optimizer, hooks: (optimizer.zero_grad(), optimizer.step()),
    "backward": lambda model, optimizer, hooks: backward(model, build_tokens(1)[0]),
    "save": lambda model, optimizer, hooks: optimizer.state_dict(),
    "prepare": lambda model, optimizer, hooks: Accelerator(cpu=True).prepare(optimizer),
    "without hooks": lambda model, optimizer, hooks: (hooks.remove(), optimizer.step()),
    "save without hooks": lambda model, optimizer, hooks: (hooks.remove(), optimizer.state_dict()),
    "new hooks": lambda model, optimizer, hooks: (hooks.remove(), step_in_backward(optimizer)),
    "a closure": lambda model, optimizer, hooks: optimizer.step(lambda: backward(model, build_tokens(1)[0])),
}


@pytest.mark.parametrize("go_on", GO_ON.values(), ids=GO_ON)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_nothing_goes_on_from_half_a_step(go_on, error):
    model, optimizer, hooks, _ = begun()
    before = broken(model, error)
    half = flat(model)
    assert not torch.equal(half, before)  # some weights were stepped, ...
    model.zero_grad()
    with pytest.raises(RuntimeError, match=HALF):
        go_on(model, optimizer, hooks)
    assert torch.equal(flat(model), half)  # ... and no others since


@pytest.mark.parametrize("kept", [True, False], ids=["the same hooks", "new hooks"])
def test_with_a_checkpoint_loaded_it_goes_on_as_if_nothing_had_been(kept):
    runs = []
    for breaks in (False, True):
        model, optimizer, hooks, (weights, state) = begun()
        if breaks:
            broken(model, OUT_OF_MEMORY)
            if not kept:
                hooks.remove()
            model.zero_grad()
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            if not kept:
                hooks = step_in_backward(optimizer)
        for row in build_tokens(3, seed=4):
            backward(model, row)
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        hooks.remove()
        backward(model, row)
        optimizer.step()
        runs.append(flat(model))
        optimizer.state_dict()
    assert torch.equal(*runs)


def test_an_error_in_the_step_of_a_weight(monkeypatch, held):
    """The weight itself may be half written."""
    model, optimizer, hooks, _ = begun()
    inner = optimizer.step_some

    def fails(group, parameters, *rest):
        if any(p is model.lm_head.weight for p in parameters):  # the first that is reached
            raise OUT_OF_MEMORY
        inner(group, parameters, *rest)

    monkeypatch.setattr(optimizer, "step_some", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(model, build_tokens(1)[0])
    with pytest.raises(RuntimeError, match=f"{3 if held else 1} of .*{HALF}"):
        optimizer.step()


def test_an_error_in_a_closure_that_goes_on():
    model, optimizer, hooks, _ = begun()

    def closure():
        broken(model, OUT_OF_MEMORY)

    with pytest.raises(RuntimeError, match=HALF):
        optimizer.step(closure)


def test_an_error_before_anything_was_stepped_is_none_of_ours():
    """In a micro-batch that only accumulates, or in the forward pass."""
    runs = []
    for breaks in (False, True):
        last = [True]
        model, optimizer, hooks, _ = begun(when=lambda last=last: last[0])
        if breaks:
            last[0] = False
            broken(model, OUT_OF_MEMORY)
            last[0] = True
            optimizer.zero_grad()
            with pytest.raises(ValueError, match="input_ids"):
                model()
        backward(model, build_tokens(1, seed=7)[0])
        optimizer.step()
        runs.append(flat(model))
    assert torch.equal(*runs)


def test_an_error_after_backward_leaves_a_whole_step():
    model, optimizer, hooks, _ = begun()
    backward(model, build_tokens(1)[0])
    optimizer.state_dict()
    optimizer.step()
    backward(model, build_tokens(1)[0])


@pytest.mark.parametrize("outside", [True, False], ids=["layers outside", "none"])
def test_reentrant_segments(outside):
    """Each is a backward pass of its own; an error between two is one of the whole pass."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    optimizer = FiraAdamW([{"params": [layer.weight for layer in layers], "rank": 2}], lr=1e-2)
    for layer in layers:
        layer.bias.requires_grad_(False)
    step_in_backward(optimizer)
    fails = [False]

    def segment(layer, x):
        if fails[0] and torch.is_grad_enabled() and layer is layers[0]:  # in the second forward pass
            raise OUT_OF_MEMORY
        return layer(x)

    def loss():
        x = torch.ones(2, 4, requires_grad=True)
        for layer in layers if not outside else layers[:2]:
            x = torch.utils.checkpoint.checkpoint(segment, layer, x, use_reentrant=True)
        return (layers[2](x) if outside else x).square().sum()

    loss().backward()
    optimizer.step()
    fails[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        loss().backward()
    fails[0] = False
    if outside:
        with pytest.raises(RuntimeError, match=HALF):
            optimizer.step()
    with pytest.raises(RuntimeError, match=HALF):
        loss().backward()


# --------------------------------------------------------------------------- in the Trainer


def interrupted(make_trainer, error, tmp_path, **arguments):
    """A trainer whose fourth step was broken off, with a checkpoint of the second."""
    model = build_llama()
    Break(middle(model), error, nth=4)
    saved = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    trainer = make_trainer(model, **(SETTINGS | saved | arguments))
    with pytest.raises(type(error)):
        trainer.train()
    return trainer


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
def test_the_trainer_goes_on_from_a_checkpoint_only(make_trainer, tmp_path, error):
    trainer = interrupted(make_trainer, error, tmp_path)
    half = flat(trainer.model)
    for optim in (NAME, "fira"):
        trainer.args.optim = type(trainer.args.optim)(optim)
        with pytest.raises(RuntimeError, match="resume_from_checkpoint"):
            trainer.train()
        assert torch.equal(flat(trainer.model), half)
    with pytest.raises(RuntimeError, match=HALF):
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer.args.optim = type(trainer.args.optim)(NAME)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = make_trainer(build_llama(), **SETTINGS)
    whole.train()
    assert torch.equal(flat(trainer.model), flat(whole.model))
    trainer.optimizer.state_dict()


def test_a_new_model_begins_anew(make_trainer):
    models = []

    def model_init():
        models.append(build_llama())
        if len(models) == 2:  # the first is that of the Trainer's constructor
            Break(middle(models[1]), OUT_OF_MEMORY, nth=3)
        return models[-1]

    trainer = make_trainer(model_init=model_init, **SETTINGS)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.train()
    whole = make_trainer(model_init=lambda: build_llama(), **SETTINGS)
    whole.train()
    assert torch.equal(flat(trainer.model), flat(whole.model))


def test_fira_finds_its_batch_size(make_trainer):
    """The other way out: an attempt that fails in backward has stepped nothing."""
    runs = []
    for fails in (True, False):
        model = build_llama()
        if fails:
            Break(middle(model), OUT_OF_MEMORY)
        sizes = {"per_device_train_batch_size": 4 if fails else 3, "auto_find_batch_size": fails}  # nine tenths of 4
        make_trainer(model, **(SETTINGS | sizes | {"optim": "fira", "max_steps": 2})).train()
        runs.append(flat(model))
    assert torch.equal(*runs)


def test_a_weight_that_was_resized_is_refused_before_any_is_stepped(tiny_llama):
    """In backward the last layers come first: they must not be a step ahead when the embedding is found not to fit."""
    model = tiny_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
    hooks = step_in_backward(optimizer)

    def backward():
        tokens = torch.arange(12)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()

    backward()
    optimizer.step()
    model.resize_token_embeddings(100)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"\(100, 32\).*another shape"):
        backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    hooks.remove()


class Branches(nn.Module):
    """Two heads on one trunk: a backward pass reaches the trunk and one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.one, self.other = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def loss(self, head):
        return head(self.trunk(torch.ones(2, 8))).square().sum()


def test_another_branch_after_a_step_that_was_broken_off():
    """As where a loop goes on with the next batch when memory has run out."""
    model = Branches()
    optimizer = FiraAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2)
    step_in_backward(optimizer)
    Break(model.trunk.weight, OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.loss(model.one).backward()
    optimizer.zero_grad()
    model.loss(model.other).backward()
    with pytest.raises(RuntimeError, match=HALF):
        optimizer.step()


def test_no_gradient_of_a_step_that_was_broken_off_is_left_to_a_new_optimizer():
    runs = []
    for breaks in (False, True):
        model, optimizer, hooks, (weights, _) = begun()
        if breaks:
            broken(model, OUT_OF_MEMORY)
        hooks.remove()
        model.load_state_dict(weights)
        optimizer = get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-2))
        hooks = step_in_backward(optimizer)
        backward(model, build_tokens(1, seed=6)[0])
        optimizer.step()
        runs.append(flat(model))
    assert torch.equal(*runs)


def whole_pass(model):
    model(torch.ones(2, 32)).square().sum().backward()


def test_backward_passes_in_two_threads():
    """Each of its own weights, as pipelines do."""
    runs = []
    for together in (False, True):
        torch.manual_seed(0)
        models = [nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(16))) for _ in range(2)]
        weights = [p for model in models for p in model.parameters()]
        optimizer = FiraAdamW([{"params": weights, "rank": 4}], lr=1e-2)
        step_in_backward(optimizer)
        for _ in range(3):
            passes = [threading.Thread(target=whole_pass, args=(model,)) for model in models]
            for one in passes:
                one.start()
                if not together:
                    one.join()
            for one in passes:
                one.join()
            optimizer.step()
        assert {int(optimizer.state[p]["step"]) for p in weights} == {3}
        runs.append(torch.cat([p.detach().flatten() for p in weights]))
    assert torch.equal(*runs)
