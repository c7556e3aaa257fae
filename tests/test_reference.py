"""Every buffer of the state, and the weight, against the plain equations in float64, step by step."""

import pytest
import torch

from fira_hf import PUBLISHED, FiraAdamW
from reference import fira_step, gradients, weight

# fp32 products of some 40 terms and a handful of operations: about 100 ulps (1.2e-7) of the buffer's norm at most.
BUFFER = 1e-5
# The residual's norm may come from a difference of energies, ||G||^2 - ||R||^2, which divides some ulps of the energy
# by the residual's share of it.
ENERGY = 1e-6
# The project's promise for weights, of the movement: N = M / sqrt(V) divides the rounding of R by its small elements.
WEIGHT = 1e-4

LAYOUT = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32), "vector": (40, 1), "row": (1, 40)}


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def compare(shape, steps=13, **group):
    parameter = weight(shape)
    start = parameter.detach().double()
    W, state = start, {}
    # short memories, so that N, which grows while the first moment fills, soon falls and the limiter lets go
    common = {"lr": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.1}
    optimizer = FiraAdamW([{"params": [parameter], **PUBLISHED, **group}], **common)
    long, short = max(shape), min(shape)
    rank = min(group["rank"], short)

    kept = group["alpha"] if group.get("residual", "reference") == "reference" else 1.0
    seen, norm_error = [], 0.0
    for t, gradient in enumerate(gradients(shape, steps)):
        parameter.grad = gradient
        optimizer.step()
        actual = optimizer.state[parameter]
        _, own, _ = fira_step(W, gradient, state, **group, **common)
        # same vectors, up to their signs; then the signs of the library, which the moments follow
        cosines = (own["basis"] * actual["basis"].double()).sum(0).abs()
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-5), t
        W, state, statistics = fira_step(W, gradient, state, basis=actual["basis"], **group, **common)

        assert set(actual) == set(state) | {"phase", "seed", "calls"}
        assert actual["step"].shape == () and actual["step"] == t + 1
        assert actual["basis"].shape == (short, rank)
        assert all(value.shape == (long, rank) for name, value in actual.items() if name in ("exp_avg", "exp_avg_sq"))
        assert actual["residual_norm"].shape == ()
        assert isinstance(actual.refresh_in, int)
        assert {v.dtype for v in actual.values() if torch.is_tensor(v)} == {torch.float32}
        for name in ("basis", *(name for name in state if name.startswith("exp_avg"))):
            assert actual[name].shape == state[name].shape, name
            assert relative(actual[name], state[name]) <= BUFFER, (t, name)
        if torch.isinf(state["residual_norm"]):
            assert torch.isinf(actual["residual_norm"]), t
        else:
            share = 1 - statistics["captured_energy"] * (1 - (1 - kept) ** 2)
            # an error of the norm that limits the next one carries over
            norm_error = max(BUFFER, ENERGY / share, norm_error if statistics["limiter_active"] else 0)
            assert relative(actual["residual_norm"], state["residual_norm"]) <= norm_error, t
        assert (parameter.detach().double() - W).norm() <= WEIGHT * (W - start).norm(), t
        seen.append(statistics["limiter_active"])
    return seen


@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("residual", ["reference", "paper"])
@pytest.mark.parametrize("scaling", ["column", "matrix", "none"])
@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
def test_every_buffer(kind, scaling, residual, gamma):
    limited = compare(
        LAYOUT[kind], rank=6, alpha=0.25, update_proj_gap=5, gamma=gamma, scaling=scaling, residual=residual
    )
    # both branches of the limiter are compared, or none at all
    assert 0 < sum(limited) < len(limited) if gamma else sum(limited) == 0


@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("base_optimizer", ["lion", "adafactor", "muon"])
def test_base_optimizers(kind, scaling, base_optimizer):
    settings = {"scaling": scaling, "base_optimizer": base_optimizer}
    limited = compare(LAYOUT[kind], rank=6, alpha=0.25, update_proj_gap=5, **settings)
    assert 0 < sum(limited) < len(limited)


@pytest.mark.parametrize("kind", ["tall", "wide", "square", "vector"])
@pytest.mark.parametrize("base_optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_rates_of_adamws_size(kind, base_optimizer):
    compare(
        LAYOUT[kind], rank=6, update_proj_gap=5, alpha=1.0, base_optimizer=base_optimizer, adjust_lr="match_rms_adamw"
    )


@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
@pytest.mark.parametrize("limiter", ["shrink", "scale"])
def test_the_limiters_of_the_ablation(limiter, kind):
    limited = compare(LAYOUT[kind], rank=6, alpha=0.25, update_proj_gap=5, gamma=0.7, limiter=limiter)
    # a smoothed norm is above the own one as often as below
    assert 0 < sum(limited) < len(limited) if limiter == "shrink" else all(limited)


@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
@pytest.mark.parametrize("update", [{"alpha": 0.0}, {"alpha": 0.25, "residual": "none"}, {"correct_bias": False}])
def test_parts_of_the_update(update, kind):
    """Only the scaled gradient, only the low-rank update, and moments whose bias stays."""
    compare(LAYOUT[kind], rank=6, update_proj_gap=5, **{"alpha": 0.25} | update)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("rank", [1, 23, 24, 100])
def test_ranks_up_to_and_beyond_the_short_side(rank, alpha):
    compare((40, 24), rank=rank, alpha=alpha, update_proj_gap=5)


@pytest.mark.parametrize("kind", ["vector", "row"])
def test_one_column(kind):
    compare(LAYOUT[kind], rank=4, alpha=0.25, update_proj_gap=5)


def test_one_square_of_one():
    compare((1, 1), rank=1, alpha=0.25, update_proj_gap=5)
