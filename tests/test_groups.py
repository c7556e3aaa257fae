"""Parameter groups: what is refused and by which words; and schedules, which act on groups."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from fira_hf import FiraAdamW, FiraConfig
from fira_hf.callbacks import state_bytes
from fira_hf.factory import build_optimizer
from reference import gradients, weight


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", v) for v in (0, -1, 1.5, "8", True, None)]
    + [("update_proj_gap", v) for v in (0, -1, 1.5, "200", None)]
    + [("alpha", v) for v in (-1.0, math.nan, math.inf, "1", None)]
    + [("gamma", v) for v in (0, -1.0, math.nan, "1.01")]
    + [("scaling", "row"), ("residual", "both"), ("projection", "full")]
    + [("proj_type", "std"), ("ranks", 8), ("scale", 0.25)]
    + [("lr", -1e-3), ("lr", math.nan), ("eps", -1e-8), ("weight_decay", -0.1)]
    + [("betas", v) for v in ((1.0, 0.999), (0.9, -0.1), (0.9,), 0.9)],
)
def test_bad_setting_of_a_projected_group(name, value):
    with pytest.raises(ValueError, match=name) as error:
        FiraAdamW([{"params": [weight((12, 8))], "rank": 4} | {name: value}])
    assert name in ("proj_type", "ranks", "scale") or str(value) in str(error.value)


@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_bad_default(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FiraAdamW([weight((12, 8))], **bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 1.0), ("update_proj_gap", 50), ("gamma", None), ("scaling", "column"), ("residual", "paper")],
)
def test_setting_without_rank_would_have_no_effect(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*rank"):
        FiraAdamW([{"params": [weight((12, 8))], name: value}])


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4, 5)])
def test_only_matrices_and_stacks_of_them_are_projected(shape):
    with pytest.raises(ValueError, match="shape") as error:
        FiraAdamW([{"params": [("layer.thing", torch.nn.Parameter(torch.ones(shape)))], "rank": 4}])
    assert "layer.thing" in str(error.value)
    assert str(shape) in str(error.value)


def test_complex_matrix():
    with pytest.raises(ValueError, match="complex"):
        FiraAdamW([{"params": [torch.nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))], "rank": 4}])


def test_refused_group_is_not_added():
    optimizer = FiraAdamW([weight((12, 8))])
    with pytest.raises(ValueError, match="rank"):
        optimizer.add_param_group({"params": [weight((12, 8))], "rank": 0})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [weight((12, 8))], "rank": 4, 1: 2})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [weight((12, 8))], "rank": 4})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("projected", [True, False])
def test_sparse_gradient(projected):
    embedding = torch.nn.Embedding(12, 8, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = FiraAdamW([{"params": list(embedding.parameters())} | ({"rank": 4} if projected else {})])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_defaults_of_a_projected_group_are_those_of_the_config():
    (group,) = FiraAdamW([{"params": [weight((12, 8))], "rank": 4}]).param_groups
    names = ("alpha", "update_proj_gap", "gamma", "projection", "refresh", "moments", "scaling", "residual", "limiter")
    assert {name: group[name] for name in names} == {name: getattr(FiraConfig(), name) for name in names}


def both(weight_decay=0.1):
    matrix, bias = weight((12, 8)), weight((8,))
    groups = [{"params": [matrix], "rank": 4, "lr": 1e-2}, {"params": [bias], "lr": 1e-3}]
    return matrix, bias, FiraAdamW(groups, weight_decay=weight_decay)


def test_schedule_scales_both_kinds_of_groups():
    """With given gradients the state does not depend on lr, so the movement of a step is proportional to it.

    Without decay, whose product with the update is of second order in lr.
    """
    factors = [1.0, 0.1, 0.0, 0.5]
    moved = {}
    for scheduled in (True, False):
        matrix, bias, optimizer = both(weight_decay=0.0)
        plan = (lambda t: factors[min(t, 3)]) if scheduled else (lambda t: 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan)
        moved[scheduled] = []
        for gradient in gradients((12, 8), 4):
            before = [p.detach().clone() for p in (matrix, bias)]
            matrix.grad, bias.grad = gradient, gradient[0].clone()
            optimizer.step()
            scheduler.step()
            moved[scheduled].append([p.detach() - b for p, b in zip((matrix, bias), before, strict=True)])
    for factor, step, plain in zip(factors, moved[True], moved[False], strict=True):
        for a, b in zip(step, plain, strict=True):
            assert b.norm() > 0
            # each movement is the difference of two weights of at most 0.25, rounded to 3e-8 at most
            assert torch.allclose(a, factor * b, rtol=1e-5, atol=6e-8)


def test_learning_rate_of_zero_decays_nothing():
    matrix, bias, optimizer = both()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for gradient in gradients((12, 8), 3):
        matrix.grad, bias.grad = gradient, gradient[0].clone()
        optimizer.step()
    assert torch.equal(matrix, weight((12, 8)))
    assert torch.equal(bias, weight((8,)))
    assert optimizer.state[matrix]["step"] == 3


def test_scheduler_state_and_resume_keep_initial_lr():
    matrix, bias, optimizer = both()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    for _ in range(3):
        matrix.grad, bias.grad = torch.ones_like(matrix), torch.ones_like(bias)
        optimizer.step()
        scheduler.step()
    _, _, resumed = both()
    again = torch.optim.lr_scheduler.LambdaLR(resumed, lambda t: 0.5**t)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    again.step()
    assert [g["lr"] for g in resumed.param_groups] == pytest.approx([1e-2 / 16, 1e-3 / 16])


# --------------------------------------------------------------------------- groups by other hands


def accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer).optimizer


AFTER = {
    "construction": lambda optimizer: optimizer,
    "load_state_dict": lambda optimizer: (optimizer.load_state_dict(optimizer.state_dict()), optimizer)[1],
    "deepcopy": copy.deepcopy,
    "pickling": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "accelerate": accelerated,
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("named", [True, False])
def test_a_group_is_added(named, after):
    """torch writes a setting of its own into the defaults; groups of the factory have names, those of a loss none."""
    known, extra = ("w", weight((12, 8))) if named else weight((12, 8)), torch.nn.Linear(4, 3)
    optimizer = AFTER[after](FiraAdamW([{"params": [known], "rank": 4}]))
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.5})
    optimizer.add_param_group({"params": weight((8, 6)), "rank": 2})
    for p in extra.parameters():
        p.grad = torch.ones_like(p)
    before = extra.bias.detach().clone()
    optimizer.step()
    assert (extra.bias - before).abs().min() > 0.4
    assert [("param_names" in group) for group in optimizer.param_groups] == [named] * 3
    if named:
        assert optimizer.param_groups[1]["param_names"] == ["parameter 1", "parameter 2"]
        assert optimizer.param_groups[2]["param_names"] == ["parameter 3"]
    # and it goes through a checkpoint
    AFTER["load_state_dict"](optimizer)


@pytest.mark.parametrize("named", [True, False])
def test_groups_with_parameters_that_are_not_the_models(tiny_llama, named):
    """Those of a loss that is trained beside the model: dense weights, which the summary tells."""
    model, loss = tiny_llama(), torch.nn.Linear(4, 3)
    own = [("loss." + name, p) for name, p in loss.named_parameters()] if named else list(loss.parameters())
    optimizer = build_optimizer(model, FiraConfig(rank=4), [{"params": list(model.parameters())}, {"params": own}])
    (group,) = (group for group in optimizer.param_groups if any(p is loss.weight for p in group["params"]))
    assert "rank" not in group
    assert group["param_names"][-1] == ("loss.bias" if named else f"parameter {len(list(model.parameters())) + 1}")
    assert "not in the model: 15 in 2" in optimizer.summary
    for p in [*model.parameters(), *loss.parameters()]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert f"{state_bytes(optimizer):,} bytes" in optimizer.summary


def test_keys_of_other_libraries_are_left_alone():
    """Names for Lightning's monitor, timm's scale of the rate, what schedulers of torch leave in a group."""
    others = {"name": "body", "lr_scale": 0.5, "max_lr": 1.0, "min_lr": 0.0, "base_momentum": 0.8, "max_momentum": 0.9}
    for rank in ({"rank": 4}, {}):
        (group,) = FiraAdamW([{"params": [weight((12, 8))], **rank, **others}]).param_groups
        assert group.items() >= others.items()


def test_settings_of_adamw_that_fira_has_not():
    """At their defaults they mean nothing: torch puts them there itself. Otherwise somebody asks for something."""
    defaults = torch.optim.AdamW([weight((12, 8))]).defaults
    (group,) = FiraAdamW([{"params": [weight((12, 8))], **defaults}]).param_groups
    assert group["lr"] == defaults["lr"]
    FiraAdamW([{"params": [weight((12, 8))], "foreach": False, "fused": False}])
    for name, value in (("amsgrad", True), ("maximize", True), ("fused", True), ("capturable", True)):
        with pytest.raises(ValueError, match=f"{name}={value}.*AdamW"):
            FiraAdamW([{"params": [weight((12, 8))], name: value}])


@pytest.mark.parametrize(
    ("name", "hint"), [("scale", "called 'alpha'"), ("rnk", "Did you mean 'rank'"), ("proj_type", "")]
)
def test_a_key_that_resembles_a_setting(name, hint):
    with pytest.raises(ValueError, match=rf"Unknown setting '{name}'.*{hint}"):
        FiraAdamW([{"params": [weight((12, 8))], "rank": 4, name: 1}])


def test_an_equal_value_of_another_type_is_kept_as_a_plain_number():
    """A schedule of numpy's numbers, whose checkpoints torch refuses to load."""
    p = weight((8, 6))
    optimizer = FiraAdamW([{"params": [p], "rank": 2, "alpha": 1.0}])
    for _ in range(2):
        optimizer.param_groups[0]["alpha"] = np.float64(1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert type(optimizer.param_groups[0]["alpha"]) is float
    optimizer.param_groups[0]["rank"] = 2.0
    with pytest.raises(ValueError, match=r"rank=2.0 is not valid: rank must be an integer"):
        optimizer.step()
