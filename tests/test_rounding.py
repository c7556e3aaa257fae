"""Weights and state in bf16: random rounding without bias, and what it is for."""

import pytest
import torch

from fira_hf import PUBLISHED, FiraAdamW
from fira_hf import functional as F
from reference import gradients, weight


def draws(value, count=20_000, seed=0):
    target = torch.empty(count, dtype=torch.bfloat16)
    F.store(target, torch.full((count,), value), torch.Generator().manual_seed(seed))
    return target.double()


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2.5e-3, 1e-30, 65504.0 * 1.003, 0.0, 1.0, -0.75])
def test_the_mean_is_the_value_and_every_draw_a_neighbour(value):
    rounded = draws(value)
    exact = torch.tensor(value, dtype=torch.float32).double()
    ulp = 2.0 ** (torch.frexp(exact.abs()).exponent.item() - 8)
    assert ((rounded - exact).abs() < ulp).all()
    # four standard errors of a mean of 20,000 draws between two neighbours
    assert abs(rounded.mean() - exact) <= 4 * 0.5 * ulp / 20_000**0.5
    assert rounded.unique().numel() == (1 if exact == torch.tensor(value).bfloat16().double() else 2)


def test_the_generator_decides():
    assert torch.equal(draws(1.001, 100), draws(1.001, 100))
    assert not torch.equal(draws(1.001, 100), draws(1.001, 100, seed=1))


def train(dtype, lr, steps, projected=True, **settings):
    parameter = weight((64, 48), dtype=dtype)
    parameter.data.fill_(1.0)
    group = {**PUBLISHED, "rank": 8, "update_proj_gap": 10} if projected else {}
    optimizer = FiraAdamW([{"params": [parameter], **group, **settings}], lr=lr)
    for gradient in gradients((64, 48), steps):
        parameter.grad = gradient.abs().to(dtype)
        optimizer.step()
    return parameter.detach().double(), optimizer


@pytest.mark.parametrize("projected", [True, False])
def test_small_updates_are_lost_to_nearest_rounding_and_not_to_random_rounding(projected):
    exact, _ = train(torch.float32, 1e-4, 40, projected)
    nearest, _ = train(torch.bfloat16, 1e-4, 40, projected)
    random, _ = train(torch.bfloat16, 1e-4, 40, projected, stochastic_rounding=True)
    moved = (1 - exact).mean()
    assert moved > 5e-4
    assert (1 - nearest).mean() < 0.2 * moved
    assert (1 - random).mean() == pytest.approx(moved.item(), rel=0.1)


def test_stochastic_rounding_leaves_fp32_weights_alone():
    one, _ = train(torch.float32, 1e-3, 12)
    other, _ = train(torch.float32, 1e-3, 12, stochastic_rounding=True)
    assert torch.equal(one, other)


def test_stochastic_rounding_of_fp16_is_refused():
    with pytest.raises(ValueError, match="stochastic_rounding=True.*fp16"):
        FiraAdamW([{"params": [weight((8, 8), dtype=torch.float16)], "rank": 2, "stochastic_rounding": True}])


@pytest.mark.parametrize("projected", [True, False])
def test_state_in_bf16_is_half_as_large_and_follows_that_in_fp32(projected):
    full, of_full = train(torch.float32, 1e-2, 60, projected)
    half, of_half = train(torch.float32, 1e-2, 60, projected, state_dtype="bfloat16")
    (state,) = of_half.state.values()
    names = ("exp_avg", "exp_avg_sq", "basis") if projected else ("exp_avg", "exp_avg_sq")
    assert all(state[name].dtype == torch.bfloat16 for name in names)
    assert state["step"].dtype == torch.float32 and (not projected or state["residual_norm"].dtype == torch.float32)
    # bf16 has a precision of 1/256; errors of single steps are independent
    assert (half - full).norm() <= 0.02 * (1 - full).norm()
    (saved,) = of_half.state_dict()["state"].values()
    assert all(saved[name].dtype == torch.bfloat16 for name in names)


def test_a_second_moment_in_bf16_follows_beta2_near_one():
    """With nearest rounding it could not change at all: 0.1% is less than half a unit in the last place."""
    parameter = weight((64, 48))
    optimizer = FiraAdamW([{"params": [parameter], **PUBLISHED, "rank": 8, "state_dtype": "bfloat16"}], lr=0.0)
    sequence = gradients((64, 48), 2)
    parameter.grad = sequence[0]
    optimizer.step()
    state = optimizer.state[parameter]
    start = state["exp_avg_sq"].double().mean()
    for _ in range(300):
        parameter.grad = 1e-6 * sequence[0]
        optimizer.step()
    assert state["exp_avg_sq"].double().mean() == pytest.approx(start.item() * 0.999**300, rel=0.02)
