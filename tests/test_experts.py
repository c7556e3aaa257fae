"""Weights that hold several matrices, each projected by itself: stacks of experts (3-D), fused parts, and the side of
the basis where a matrix is stored the other way round."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fira_hf.matrices
import fira_hf.refresh
import fira_hf.state
from fira_hf import PUBLISHED, FiraAdamW, FiraConfig, get_fira_optimizer
from reference import assert_resumes, gradients, weight

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (24, 24)}
EXPERTS = 3
STEPS = 12
GROUP = {**PUBLISHED, "rank": 6, "update_proj_gap": 5, "alpha": 0.25}
WHOLE = {"projection": "power", "moments": "rotated", "base_optimizer": "muon", "residual": "moment"}
SETTINGS = {
    "svd": {},
    "power": {"projection": "power", "moments": "rotated"},
    "staggered": {"projection": "power", "refresh": "staggered", "moments": "kept"},
    "lion": {"projection": "power", "moments": "rotated", "base_optimizer": "lion"},
    "adafactor": {"projection": "power", "moments": "rotated", "base_optimizer": "adafactor"},
    "muon": {"projection": "power", "moments": "rotated", "base_optimizer": "muon"},
    "columns": {"projection": "columns", "moments": "rotated"},
    "whole moment": WHOLE,
    "4 bits": {**WHOLE, "state_dtype": "int4"},
    "random": {"projection": "random", "scaling": "matrix", "residual": "paper"},
    "bf16 state": {"state_dtype": "bfloat16"},
    "8 bits": {"projection": "power", "moments": "rotated", "state_dtype": "int8"},
    "rounded at random": {"stochastic_rounding": True},
}


@pytest.fixture
def one_seed(monkeypatch):
    """Draws do not depend on the parameter that they are for: a stack has one seed, separate matrices have theirs."""
    for module in (fira_hf.matrices, fira_hf.state, fira_hf.refresh):
        monkeypatch.setattr(module, "seed_of", lambda state, *numbers: 7)


def optimizer_of(params, **settings):
    return FiraAdamW([{"params": params, **GROUP, **settings}], lr=1e-2, weight_decay=0.1)


def sequences(shape, steps=STEPS, experts=EXPERTS):
    """The gradients of each expert, step by step."""
    return [gradients(shape, steps, seed=e) for e in range(experts)]


def stack_of(matrices):
    return nn.Parameter(torch.stack([m.detach() for m in matrices]))


def state_equals(state, index, other):
    """Whether entry `index` of a stacked state is the state of a matrix by itself."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        if name in ("seed", "calls", "phase"):  # one for all of the stack
            continue
        entry = state[name][index]
        assert torch.equal(entry, value) if torch.is_tensor(value) else entry == value, name
    return True


# --------------------------------------------------------------------------- a stack is its matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_stack_trains_as_its_matrices_would_by_themselves(shape, settings, dtype, one_seed):
    matrices = [weight(shape, seed=e, dtype=dtype) for e in range(EXPERTS)]
    stack = stack_of(matrices)
    apart, together = optimizer_of(matrices, **settings), optimizer_of([stack], **settings)
    for grads in zip(*sequences(shape), strict=True):
        for matrix, grad in zip(matrices, grads, strict=True):
            matrix.grad = grad.to(dtype)
        stack.grad = torch.stack(grads).to(dtype)
        apart.step()
        together.step()
        assert torch.equal(stack, torch.stack(matrices))
    assert all(state_equals(together.state[stack], e, apart.state[matrix]) for e, matrix in enumerate(matrices))


def test_a_stack_where_the_basis_is_found_by_iteration(one_seed):
    """Beyond 64 columns of the short side."""
    shape = (80, 72)
    matrices = [weight(shape, seed=e) for e in range(EXPERTS)]
    stack = stack_of(matrices)
    apart, together = (optimizer_of(p, projection="power") for p in (matrices, [stack]))
    for grads in zip(*sequences(shape), strict=True):
        for matrix, grad in zip(matrices, grads, strict=True):
            matrix.grad = grad
        stack.grad = torch.stack(grads)
        apart.step()
        together.step()
    assert torch.equal(stack, torch.stack(matrices))


def test_the_shapes_of_the_state():
    long, short, rank = 40, 24, GROUP["rank"]
    stack = stack_of([weight((short, long), seed=e) for e in range(EXPERTS)])
    optimizer = optimizer_of([stack])
    stack.grad = torch.stack([g[0] for g in sequences((short, long), 1)])
    optimizer.step()
    shapes = {name: tuple(v.shape) for name, v in optimizer.state[stack].items() if torch.is_tensor(v)}
    assert shapes == {
        "step": (EXPERTS,),
        "residual_norm": (EXPERTS,),
        "basis": (EXPERTS, short, rank),
        "exp_avg": (EXPERTS, long, rank),
        "exp_avg_sq": (EXPERTS, long, rank),
    }


# --------------------------------------------------------------------------- an expert without tokens


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan], ids=["no tokens", "inf", "nan"])
@pytest.mark.parametrize("when", [range(0, 3), range(4, 8), range(STEPS)], ids=["at first", "later", "always"])
@pytest.mark.parametrize("settings", [{}, SETTINGS["staggered"]], ids=["svd", "staggered"])
def test_an_expert_without_a_usable_gradient_is_left_untouched(when, bad, settings, one_seed):
    """Its weight and state stay bit for bit, decay included; the others, and itself at other steps, train on."""
    shape, idle = SHAPES["wide"], 1
    matrices = [weight(shape, seed=e) for e in range(EXPERTS)]
    stack = stack_of(matrices)
    apart, together = optimizer_of(matrices, **settings), optimizer_of([stack], **settings)
    for t, grads in enumerate(zip(*sequences(shape), strict=True)):
        for e, (matrix, grad) in enumerate(zip(matrices, grads, strict=True)):
            matrix.grad = None if e == idle and t in when else grad
        spoiled = [g.clone() for g in grads]
        if t in when and bad == 0.0:
            spoiled[idle].zero_()
        elif t in when:
            spoiled[idle][3, 7] = bad
        stack.grad = torch.stack(spoiled)
        state = together.state.get(stack, {})
        before = (
            stack[idle].clone(),
            {k: copy.deepcopy(v[idle]) for k, v in state.items() if k not in ("seed", "calls", "phase")},
        )
        apart.step()
        together.step()
        if t in when:
            assert torch.equal(stack[idle], before[0])
            for name, value in before[1].items():
                after = together.state[stack][name][idle]
                assert torch.equal(after, value) if torch.is_tensor(value) else after == value, name
        else:
            assert not torch.equal(stack[idle], before[0])
        assert torch.equal(stack, torch.stack(matrices))
    for e, matrix in enumerate(matrices):
        if e != idle or when != range(STEPS):
            assert state_equals(together.state[stack], e, apart.state[matrix])


def test_a_stack_of_which_no_expert_has_tokens_has_no_state():
    stack = stack_of([weight((12, 8), seed=e) for e in range(EXPERTS)])
    before = stack.detach().clone()
    optimizer = optimizer_of([stack])
    stack.grad = torch.zeros_like(stack)
    optimizer.step()
    assert torch.equal(stack, before)
    assert not optimizer.state


# --------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS.values(), {"split": 2}, {"split": 2, "transposed": True}],
    ids=[*SETTINGS, "in parts", "transposed in parts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resuming_in_mid_interval_ends_in_the_same_bits(settings, dtype):
    """One expert begins after the checkpoint, one has begun later than the others."""
    shape, stop = SHAPES["tall"], 7
    stack = stack_of([weight(shape, seed=e, dtype=dtype) for e in range(EXPERTS)])
    grads = [torch.stack(g).to(dtype) for g in zip(*sequences(shape), strict=True)]
    for t, grad in enumerate(grads):
        grad[1] *= t >= 2
        grad[2] *= t > stop
    assert_resumes(lambda params: optimizer_of(params, **settings), [stack], [[grad] for grad in grads], stop)


def test_a_checkpoint_of_other_experts_or_other_parts_is_refused():
    def trained(shape, **settings):
        p = nn.Parameter(torch.ones(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = optimizer_of([p], **settings)
        optimizer.step()
        return optimizer

    saved = trained((3, 12, 8)).state_dict()
    with pytest.raises(ValueError, match="another shape"):
        trained((4, 12, 8)).load_state_dict(saved)
    with pytest.raises(ValueError, match="split"):
        trained((3, 12, 8), split=2).load_state_dict(saved)
    with pytest.raises(ValueError, match="transposed"):
        trained((3, 12, 8), transposed=True).load_state_dict(saved)
    trained((3, 12, 8)).load_state_dict(saved)


# --------------------------------------------------------------------------- fused parts


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["as Linear", "as Conv1D"])
@pytest.mark.parametrize("shape", [(96, 20), (96, 60), (96, 32)], ids=["tall", "wide", "square parts"])
def test_the_parts_of_a_fused_matrix_train_as_separate_layers(shape, transposed, settings, one_seed):
    """A weight (out, in), or (in, out) if transposed, in three parts of (out / 3, in)."""
    if transposed and settings.get("state_dtype") == "int4":
        pytest.skip("other values share a scale than in the separate layers: the whole moment in fp32 is compared")
    fused = weight(shape)
    parts = [nn.Parameter(part.detach().clone()) for part in fused.chunk(3)]
    if transposed:
        fused = nn.Parameter(fused.detach().t().contiguous())
    together = optimizer_of([fused], split=3, transposed=transposed, **settings)
    apart = optimizer_of(parts, **settings)
    for grad in gradients(shape, STEPS):
        fused.grad = grad.t().contiguous() if transposed else grad
        for p, part in zip(parts, grad.chunk(3), strict=True):
            p.grad = part.clone()
        together.step()
        apart.step()
    whole = torch.cat([p.detach() for p in parts])
    if transposed:
        # The layouts differ, and with them the order of sums; a bf16 moment may be rounded to its other neighbour.
        tolerance = 2e-3 if "state_dtype" in settings else 1e-6
        torch.testing.assert_close(fused.detach().t(), whole, rtol=0, atol=tolerance)
    else:
        assert torch.equal(fused, whole)
    assert not torch.equal(whole, weight(shape))
    assert together.state[fused]["step"].shape == (3,)


def test_a_stack_of_fused_matrices_has_its_parts_in_order(one_seed):
    """Expert 0 part 0, expert 0 part 1, expert 1 part 0, ...; each as if it were a matrix by itself."""
    stack = stack_of([weight((20, 12), seed=e) for e in range(EXPERTS)])
    parts = [nn.Parameter(part.clone()) for expert in stack.detach() for part in expert.chunk(2)]
    together, apart = optimizer_of([stack], split=2), optimizer_of(parts)
    for grads in zip(*sequences((20, 12)), strict=True):
        stack.grad = torch.stack(grads)
        for p, part in zip(parts, [part for grad in grads for part in grad.chunk(2)], strict=True):
            p.grad = part.clone()
        together.step()
        apart.step()
    assert torch.equal(stack.detach().reshape(len(parts), 10, 12), torch.stack(parts))
    assert all(state_equals(together.state[stack], i, apart.state[part]) for i, part in enumerate(parts))


@pytest.mark.parametrize(
    ("shape", "settings"), [((10, 12), {"split": 3}), ((12, 10), {"split": 3, "transposed": True})], ids=str
)
def test_parts_must_be_equal(shape, settings):
    with pytest.raises(ValueError, match="split=3.*output dimension of qkv"):
        FiraAdamW([{"params": [("qkv", weight(shape))], "rank": 4, **settings}])


@pytest.mark.parametrize(("name", "value"), [("split", 0), ("split", 1.5), ("transposed", 1)])
def test_bad_layouts_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        FiraAdamW([{"params": [weight((12, 8))], "rank": 4, name: value}])


# --------------------------------------------------------------------------- stored the other way round


def pair(out_features, in_features):
    """A Linear and a Conv1D that are the same function."""
    linear, conv = nn.Linear(in_features, out_features), Conv1D(out_features, in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    conv.bias = nn.Parameter(linear.bias.detach().clone())
    return nn.Sequential(linear), nn.Sequential(conv)


@pytest.mark.parametrize("projection", ["svd", "power"])
@pytest.mark.parametrize("sides", [(24, 24), (40, 24), (24, 40)], ids=["square", "tall", "wide"])
def test_a_conv1d_trains_as_the_linear_layer_that_it_is(sides, projection):
    """Also where it is square, and the sides of the stored matrix do not say which of them the basis spans."""
    linear, conv = pair(*sides)
    settings = PUBLISHED | {"rank": 6, "update_proj_gap": 5, "projection": projection, "lr": 1e-2, "weight_decay": 0.1}
    optimizers = [get_fira_optimizer(model, FiraConfig(**settings)) for model in (linear, conv)]
    for grad in gradients(sides, STEPS):
        linear[0].weight.grad, conv[0].weight.grad = grad, grad.t().contiguous()
        for optimizer in optimizers:
            optimizer.step()
    bases = [opt.state[model[0].weight]["basis"] for opt, model in zip(optimizers, (linear, conv), strict=True)]
    assert bases[0].shape == bases[1].shape == (min(sides), 6)
    torch.testing.assert_close(conv[0].weight.t(), linear[0].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(*bases, rtol=0, atol=1e-5)


def test_square_matrices_side():
    """The published rule: the basis of a square (out, in) spans the inputs; here the gradient has one input only."""
    grad = torch.outer(torch.arange(1.0, 9.0), torch.eye(8)[3])
    for transposed in (False, True):
        p = nn.Parameter(torch.zeros(8, 8))
        p.grad = grad.t().contiguous() if transposed else grad.clone()
        optimizer = FiraAdamW([{"params": [p], "rank": 1, "transposed": transposed}])
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["basis"].abs(), torch.eye(8)[:, 3:4])
