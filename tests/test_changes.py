"""What people do to weights while an optimizer holds them: what it survives, and what it refuses before it writes."""

import copy
import re

import pytest
import torch
from torch import nn

from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from reference import gradients, weight

SHAPE = (12, 8)
# What a group makes of a weight, and a weight for it.
KINDS = {
    "dense": ({}, SHAPE),
    "projected": ({"rank": 4}, SHAPE),
    "lion": ({"rank": 4, "base_optimizer": "lion"}, SHAPE),
    "adafactor": ({"rank": 4, "base_optimizer": "adafactor"}, SHAPE),
    "columns": ({"rank": 4, "projection": "columns", "base_optimizer": "muon"}, SHAPE),
    "4 bits": ({"rank": 4, "base_optimizer": "muon", "residual": "moment", "state_dtype": "int4"}, SHAPE),
    "stack": ({"rank": 4}, (3, *SHAPE)),
    "parts": ({"rank": 4, "split": 2}, SHAPE),
}
of_kinds = pytest.mark.parametrize("kind", KINDS)


def begun(kind, dtype=torch.float32, steps=2, **settings):
    """An optimizer of a bias and a weight of the kind, both stepped, with gradients for the next step."""
    group, shape = KINDS[kind]
    bias, p = nn.Parameter(torch.ones(5)), weight(shape, dtype=dtype)
    groups = [{"params": [("bias", bias)], **settings}, {"params": [("layer.weight", p)], **group, **settings}]
    optimizer = FiraAdamW(groups)
    for gradient in random_gradients(shape, steps + 1):
        bias.grad, p.grad = torch.ones(5), gradient.to(dtype)
        if len(optimizer.state) < 2 or optimizer.state[p]["step"].max() < steps:
            optimizer.step()
    return optimizer, bias, p


def random_gradients(shape, steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def everything(optimizer):
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((weights, optimizer.state_dict()["state"]))


def assert_refused(optimizer, *words):
    """The step is an error with these words, and nothing was written, in groups that come before either."""
    before = everything(optimizer)
    with pytest.raises((RuntimeError, ValueError)) as error:
        optimizer.step()
    assert all(word in str(error.value) for word in ("layer.weight", *words)), error.value
    for old, new in zip(before[0], everything(optimizer)[0], strict=True):
        assert equal(old, new)
    assert equal(before[1], everything(optimizer)[1])


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if torch.is_tensor(one):
        return one.device == other.device and (one.is_meta or torch.equal(one, other))
    return one == other


def to_meta(p):
    """As `model.to(...)` moves a weight where torch swaps tensors on conversion."""
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
    p.grad = torch.ones_like(p)


@of_kinds
@pytest.mark.parametrize("rows", [8, 20])
def test_a_weight_that_is_resized_in_place(kind, rows):
    """As `resize_token_embeddings` does it. torch's fused kernels would write past the end of the moments."""
    optimizer, _, p = begun(kind)
    p.data = torch.ones(*p.shape[:-2], rows, p.shape[-1])
    p.grad = torch.ones_like(p)
    assert_refused(optimizer, str(tuple(p.shape)), "another shape", "make a new one")


def test_resizing_the_embeddings_of_a_model(tiny_llama):
    model = tiny_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))

    def step():
        tokens = torch.arange(12)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model.resize_token_embeddings(100)
    with pytest.raises(RuntimeError, match=r"embed_tokens.*\(100, 32\).*\(64, 32\)"):
        step()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))  # the way out
    step()


@of_kinds
def test_a_gradient_of_another_shape(kind):
    optimizer, _, p = begun(kind)
    old = p.grad
    p.grad = None
    p.data = torch.ones(*p.shape[:-2], 20, p.shape[-1])
    p.grad = torch.ones_like(p)
    p.data = torch.ones(old.shape)  # torch checks a gradient only where it is set
    assert_refused(optimizer, "gradient", "20")


@of_kinds
def test_a_weight_that_becomes_meta(kind):
    optimizer, _, p = begun(kind)
    to_meta(p)
    assert_refused(optimizer, "meta")


@of_kinds
def test_a_state_on_another_device(kind):
    optimizer, _, p = begun(kind)
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to("meta")
    assert_refused(optimizer, "exp_avg", "meta", "load_state_dict(optimizer.state_dict())")


@of_kinds
def test_a_weight_of_a_dtype_that_cannot_be_trained(kind):
    optimizer, _, p = begun(kind)
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones_like(p)
    assert_refused(optimizer, "float64")


@pytest.mark.parametrize("kind", ["dense", "projected"])
def test_fp16_with_stochastic_rounding(kind):
    optimizer, _, p = begun(kind, torch.bfloat16, stochastic_rounding=True)
    p.data, p.grad = p.data.half(), None
    p.grad = torch.ones_like(p)
    assert_refused(optimizer, "stochastic_rounding")


@of_kinds
@pytest.mark.parametrize("missing", [True, False])
def test_a_state_that_was_set_by_other_means(kind, missing):
    optimizer, _, p = begun(kind)
    name = "exp_avg_sq" if "exp_avg_sq" in optimizer.state[p] else "exp_avg"
    if missing:
        del optimizer.state[p][name]
    else:
        optimizer.state[p][name] = optimizer.state[p][name][..., :2]
    assert_refused(optimizer, name)


@pytest.mark.parametrize(("setting", "value"), [("rank", 2), ("base_optimizer", "adafactor"), ("split", 2)])
def test_a_setting_of_a_group_that_the_state_does_not_fit(setting, value):
    optimizer, _, p = begun("projected")
    optimizer.param_groups[1][setting] = value
    assert_refused(optimizer, "state")


@of_kinds
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_weight_that_is_cast(kind, before, after, rounding, state_dtype):
    """After a step, and between a save and a load; either way the optimizer goes on as from one state."""
    settings = {"stochastic_rounding": rounding, "state_dtype": state_dtype}
    optimizer, _, p = begun(kind, getattr(torch, before), **settings)
    saved = optimizer.state_dict()
    gradient = p.grad
    p.data, p.grad = p.data.to(getattr(torch, after)), None

    resumed, other_bias, other = begun(kind, getattr(torch, after), steps=0, **settings)
    other.data, other_bias.data = p.data.clone(), optimizer.param_groups[0]["params"][0].data.clone()
    resumed.load_state_dict(copy.deepcopy(saved))
    for _ in range(2):
        p.grad, other.grad = gradient.to(p.dtype), gradient.to(p.dtype)
        optimizer.step()
        resumed.step()
    assert torch.equal(p, other) and p.isfinite().all()
    assert equal(optimizer.state_dict()["state"], resumed.state_dict()["state"])
    assert optimizer.state[p]["exp_avg"].dtype == getattr(torch, state_dtype)


def test_state_moves_by_loading_it():
    """The way out that the error for a state on another device names: by it the state follows the weight."""
    optimizer, _, p = begun("projected")
    state = optimizer.state_dict()
    to_meta(p)
    optimizer.load_state_dict(state)
    assert {v.device.type for v in optimizer.state[p].values() if torch.is_tensor(v)} == {"meta"}


def test_weights_that_are_frozen_and_thawed():
    optimizer, _, p = begun("projected")
    kept, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.requires_grad_(False).grad = None
    optimizer.step()
    assert torch.equal(p, kept) and equal(optimizer.state[p], state)
    p.requires_grad_(True).grad = gradients(SHAPE, 1)[0]
    optimizer.step()
    assert optimizer.state[p]["step"] == 3 and not torch.equal(p, kept)


def test_the_error_of_a_nameless_weight_says_which_it_is():
    p = weight(SHAPE)
    optimizer = FiraAdamW([{"params": [weight(SHAPE), p], "rank": 4}])
    p.grad = gradients(SHAPE, 1)[0]
    optimizer.step()
    p.data, p.grad = torch.ones(20, 8), None
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=re.escape("parameter 1 of its group of shape (20, 8)")):
        optimizer.step()
