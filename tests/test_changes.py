"""What people do to weights while an optimizer holds them: what it survives, and what it refuses before it writes."""

import copy
import re
import shutil

import numpy as np
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
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
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


def test_a_weight_without_a_gradient_is_not_asked():
    """Another one of its group is stepped as before, whatever has become of it."""
    p, idle = weight(SHAPE), weight(SHAPE)
    optimizer = FiraAdamW([{"params": [p, idle], "rank": 4}])
    p.grad = gradients(SHAPE, 1)[0]
    idle.data = idle.data.double()
    optimizer.step()
    assert (p != weight(SHAPE)).any() and (idle == weight(SHAPE)).all()


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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank", 2),
        ("base_optimizer", "adafactor"),
        ("split", 2),
        ("projection", "columns"),
        ("state_dtype", "bfloat16"),
        ("state_dtype", "int8"),
    ],
)
def test_a_setting_of_a_group_that_the_state_does_not_fit(setting, value):
    optimizer, _, p = begun("projected")
    before = optimizer.param_groups[1][setting]
    optimizer.param_groups[1][setting] = value
    assert_refused(optimizer, f"made with {setting}={before!r}", f"says {setting}={value!r}")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scaling", "row"),
        ("moments", "rotate"),
        ("adjust_lr", "match"),
        ("projection", "powr"),
        ("update_proj_gap", 0),
        ("stochastic_rounding", "yes"),
        ("alpha", -1.0),
        ("gamma", 0.5),
        ("residual", "papr"),
        ("maximize", True),
        ("update_proj_gp", 3),
        ("scale", 3.0),
        ("alpha", np.array([1.0, 2.0])),
        ("rank", torch.tensor([4, 4])),
        ("amsgrad", True),
        ("lr", float("nan")),
        ("eps", -1.0),
        ("betas", 0.9),
        ("weight_decay", "0.1"),
    ],
)
def test_a_setting_that_is_assigned_is_checked_before_anything_is_written(setting, value):
    """The group before it is not stepped either."""
    optimizer, *_ = begun("projected")
    before = everything(optimizer)
    optimizer.param_groups[1][setting] = value
    with pytest.raises(ValueError, match=setting):
        optimizer.step()
    assert all(map(equal, before, everything(optimizer)))


@pytest.mark.parametrize("steps", [5, 10])
def test_a_schedule_that_ends_at_zero_but_for_rounding_is_taken(steps):
    optimizer, bias, p = begun("projected")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, end_factor=0.0, total_iters=steps)
    for _ in range(steps + 2):
        bias.grad, p.grad = torch.ones(5), gradients(SHAPE, 1)[0]
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0, abs=1e-12)
    # Also in the step after a load, which looks at every setting of the groups.
    for group in (saved := copy.deepcopy(optimizer.state_dict()))["param_groups"]:
        group["lr"] = -1e-20
    optimizer.load_state_dict(saved)
    bias.grad, p.grad = torch.ones(5), gradients(SHAPE, 1)[0]
    optimizer.step()


def test_a_rank_that_comes_to_a_group_or_goes_from_it_is_refused():
    for kind, change in (
        ("dense", lambda group: group.update(rank=4)),
        ("projected", lambda group: group.pop("rank")),
    ):
        optimizer, *_ = begun(kind)
        change(optimizer.param_groups[1])
        with pytest.raises((RuntimeError, ValueError), match="has a rank now|without 'rank'"):
            optimizer.step()


def test_another_interval_counts_from_the_next_step():
    """In a run that goes on as in one that is resumed."""
    bases = []
    for is_resumed in (False, True):
        p = weight(SHAPE)
        optimizer = FiraAdamW([{"params": [p], "rank": 4, "update_proj_gap": 200, "refresh": "together"}])
        seen = []
        for t, gradient in enumerate(random_gradients(SHAPE, 12)):
            if t == 3:
                optimizer.param_groups[0]["update_proj_gap"] = 4
                if is_resumed:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            p.grad = gradient
            optimizer.step()
            seen.append(optimizer.state[p]["basis"].clone())
        bases.append(seen)
    assert all(map(torch.equal, *bases))
    changes = [t for t in range(1, 12) if not torch.equal(bases[0][t - 1], bases[0][t])]
    assert changes == [4, 8]


def test_moments_of_other_columns_go_with_the_interval():
    p = weight((24, 16))
    optimizer = FiraAdamW([{"params": [p], "rank": 4, "projection": "columns", "refresh": "together"}])
    for t, gradient in enumerate(random_gradients((24, 16), 7)):
        if t == 6:
            optimizer.param_groups[0]["update_proj_gap"] = 3
        p.grad = gradient
        optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("kind", ["dense", "projected"])
@pytest.mark.parametrize(("saved_as", "state_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_saved_state_is_loaded_in_the_dtype_that_state_dtype_says(kind, saved_as, state_dtype):
    """As that of torch's AdamW on bf16 weights: rounded to the nearest, moments in bf16 would stand still, and a count
    would at 256."""
    optimizer, _, p = begun(kind, state_dtype=state_dtype)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, value in state.items():
            if torch.is_tensor(value):
                state[name] = value.to(getattr(torch, saved_as))
    optimizer.load_state_dict(saved)
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg_sq"].dtype == getattr(torch, state_dtype) and state["step"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["dense", "projected"])
def test_a_gradient_that_no_step_can_be_made_of(kind):
    optimizer, _, p = begun(kind)
    p.grad_dtype = None
    p.grad = p.grad.double()
    assert_refused(optimizer, "torch.float64")
    optimizer, _, p = begun(kind)
    p.data = p.data[:1].expand_as(p.data)
    assert_refused(optimizer, "expanded")


def test_what_others_keep_in_the_state_is_saved():
    optimizer, *_ = begun("projected")
    optimizer.state["epoch"] = 3
    assert optimizer.state_dict()["state"]["epoch"] == 3


def test_frozen_weights_of_any_dtype_may_be_in_a_group():
    """As the base of a model in 4 bits, with `FiraAdamW(model.parameters())`."""
    frozen, p = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False), weight(SHAPE)
    optimizer = FiraAdamW([{"params": [p, frozen], "rank": 4}])
    p.grad = gradients(SHAPE, 1)[0]
    optimizer.step()
    assert (p != weight(SHAPE)).any() and not frozen.any()


def test_a_weight_that_was_added_to_a_group_by_hand_has_a_name_in_errors():
    optimizer, *_ = begun("projected")
    p = weight(SHAPE)
    optimizer.param_groups[1]["params"].append(p)
    p.grad = gradients(SHAPE, 1)[0]
    optimizer.step()
    p.data, p.grad = torch.ones(20, 8), None
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 1 of its group"):
        optimizer.step()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_makes_the_states_of_an_ordinary_one():
    """A compiler may make one tensor of two copies of the same zeros."""
    weights = [nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizers = [FiraAdamW([p], lr=1e-2) for p in weights]
    steps = [torch.compile(optimizers[0].step), optimizers[1].step]
    for gradient in random_gradients((8,), 3):
        for p, step in zip(weights, steps, strict=True):
            p.grad = gradient.clone()
            step()
    torch.testing.assert_close(*weights)


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
