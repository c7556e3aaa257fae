"""When bases are refreshed, and what becomes of the moments."""

import warnings

import pytest
import torch

import fira_hf.matrices
import fira_hf.refresh
from fira_hf import PUBLISHED, FiraAdamW, base_optimizers
from fira_hf import functional as F
from recipes.benchmarks.models import Pretended
from reference import assert_resumes, gradients, weight

SHAPES = [(96, 80), (80, 96), (80, 80), (96, 80), (96, 72), (40, 100)]


def optimizer_of(parameters, gap=12, **settings):
    group = {"rank": 8, "update_proj_gap": gap, "projection": "power", "refresh": "together", **settings}
    return FiraAdamW([{"params": parameters, **group}], lr=1e-3)


def make(**settings):
    parameters = [weight(shape, seed=i) for i, shape in enumerate(SHAPES)]
    return parameters, optimizer_of(parameters, **settings)


def noise(seed, shapes=SHAPES):
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(shapes))]
    return [torch.randn(shape, generator=generator) for shape, generator in zip(shapes, generators, strict=True)]


def step(parameters, optimizer, seed):
    for p, gradient in zip(parameters, noise(seed, [p.shape for p in parameters]), strict=True):
        p.grad = gradient.to(p.dtype)
    optimizer.step()


def bases(parameters, optimizer):
    return [optimizer.state[p]["basis"].clone() for p in parameters]


def refreshed(parameters, optimizer, steps):
    """For each step which matrices got a new basis; the first step creates all of them."""
    seen, old = [], None
    for seed in range(steps):
        step(parameters, optimizer, seed)
        new = bases(parameters, optimizer)
        if old is not None:
            seen.append([i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not torch.equal(a, b)])
        old = new
    return seen


def test_together_refreshes_all_at_once():
    parameters, optimizer = make(gap=5)
    assert refreshed(parameters, optimizer, 12) == [
        list(range(len(SHAPES))) if done in (5, 10) else [] for done in range(1, 12)
    ]


def test_staggered_refreshes_each_once_an_interval_and_a_share_of_the_work_at_a_time():
    parameters, optimizer = make(gap=12, refresh="staggered")
    seen = refreshed(parameters, optimizer, 37)
    for start in (0, 12, 24):
        assert sorted(i for step in seen[start : start + 12] for i in step) == list(range(len(SHAPES)))
    assert seen[:12] == seen[12:24] == seen[24:36]
    cost = [p.numel() for p in parameters]
    assert max(sum(cost[i] for i in step) for step in seen) <= max(max(cost), 2 * sum(cost) / 12)


def test_more_matrices_than_steps_are_spread_evenly():
    parameters = [weight((10, 8), seed=i) for i in range(30)]
    settings = {"rank": 2, "update_proj_gap": 7, "refresh": "staggered", "projection": "svd"}
    seen = refreshed(parameters, FiraAdamW([{"params": parameters, **settings}], lr=1e-3), 15)
    assert {len(step) for step in seen} <= {4, 5}


def test_what_is_refreshed_at_a_step_is_of_few_shapes():
    """As in a model, whose layers have all of them: what is of one shape is refreshed by one batch."""
    shapes = [(10, 8), (8, 10), (12, 8)] * 10
    parameters = [weight(shape, seed=i) for i, shape in enumerate(shapes)]
    seen = refreshed(parameters, optimizer_of(parameters, gap=10, refresh="staggered"), 21)
    assert {len(step) for step in seen[:20]} <= {2, 3, 4}
    assert sum(len({shapes[i] for i in step}) for step in seen[10:20]) <= 12  # two steps have two


@pytest.mark.parametrize("projection", ["svd", "power", "random", "columns"])
@pytest.mark.parametrize("refresh", ["together", "staggered"])
@pytest.mark.parametrize("moments", ["kept", "rotated"])
@pytest.mark.parametrize("base_optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_a_resumed_run_refreshes_and_rounds_as_if_it_had_not_stopped(base_optimizer, projection, refresh, moments):
    settings = {"gap": 6, "projection": projection, "refresh": refresh, "moments": moments}
    settings |= {"base_optimizer": base_optimizer}
    settings |= {"stochastic_rounding": True, "state_dtype": "bfloat16"}
    parameters = [weight(shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(SHAPES)]
    assert_resumes(lambda params: optimizer_of(params, **settings), parameters, [noise(t) for t in range(20)], stop=9)


def test_zero_gradients_delay_a_staggered_refresh_by_as_many_steps():
    shape = (40, 24)
    settings = {"rank": 4, "update_proj_gap": 4, "refresh": "staggered"}
    plain, delayed = weight(shape), weight(shape)
    one, other = (FiraAdamW([{"params": [p], **settings}], lr=1e-2) for p in (plain, delayed))
    for t, gradient in enumerate(gradients(shape, 11)):
        plain.grad = gradient
        one.step()
        for grad in [torch.zeros(shape)] * (t % 3) + [gradient]:
            delayed.grad = grad
            other.step()
    assert torch.equal(plain, delayed)


def refresh_once(moments, M, V, seed=5):
    """State before and after a refresh of one matrix, with these moments in the old basis."""
    parameter = weight((60, 40))
    settings = {**PUBLISHED, "rank": 6, "update_proj_gap": 1, "moments": moments}
    optimizer = FiraAdamW([{"params": [parameter], **settings}], lr=0.0, betas=(0.9, 0.99))
    sequence = gradients((60, 40), seed)
    for gradient in sequence[:-1]:
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg"].copy_(M), state["exp_avg_sq"].copy_(V)
    before = {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
    parameter.grad = torch.zeros(60, 40)
    parameter.grad.copy_(sequence[-1])
    G, Q = parameter.grad, None
    optimizer.step()
    Q = state["basis"]
    # undo the update of the moments by this step's gradient
    R = G @ Q
    return before, Q, (state["exp_avg"] - 0.1 * R) / 0.9, (state["exp_avg_sq"] - 0.01 * R**2) / 0.99


def test_kept_moments_stay():
    M, V = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)), torch.rand(60, 6) + 1
    _, _, M_new, V_new = refresh_once("kept", M, V)
    assert torch.allclose(M_new, M, atol=1e-4) and torch.allclose(V_new, V, atol=1e-4)


def test_rotated_moments_stand_for_the_same_directions():
    """The first moment as far as the new basis reaches; the second never less than the square of the first."""
    M = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    V = M**2 + torch.rand(60, 6)
    before, Q, M_new, V_new = refresh_once("rotated", M, V)
    C = before["basis"].T @ Q
    assert torch.allclose(M_new, M @ C, atol=1e-4)
    t = before["step"].item()
    ratio = (1 - 0.99**t) / (1 - 0.9**t) ** 2
    expected = (V - ratio * M**2).clamp(min=0) @ C**2 + ratio * (M @ C) ** 2
    assert torch.allclose(V_new, expected, atol=1e-4)


def test_rotating_into_the_same_subspace_and_back_changes_the_first_moment_by_rounding():
    C = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    M, V = torch.randn(60, 6), torch.rand(60, 6) + 4
    start = M.clone()
    for turn in (C, C.T):
        M, V = base_optimizers.rotated_moments("adamw", [M, V], turn, torch.tensor(1.0))
    assert torch.allclose(M, start, atol=1e-5)
    assert (V > 0).all()


def test_adafactors_moments_follow_the_basis():
    """V is carried over by the squares of C, as that of AdamW whose gradients have no mean."""
    generator = torch.Generator().manual_seed(0)
    C = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q[:, :5] * 0.9  # some of the energy is lost
    M, row, col = (torch.rand(shape, generator=generator) for shape in ((60, 5 + 1), (60, 1), (1, 6)))
    V, first = row @ col / col.mean(), M
    C = torch.nn.functional.pad(C, (0, 1))
    col, row, M = base_optimizers.rotated_moments("adafactor", [col, row, M], C, torch.tensor(1.0))
    assert torch.allclose(M, first @ C)
    assert torch.allclose(row @ col / col.mean(), V @ C.square(), rtol=1e-5)


def test_a_matrix_without_a_basis_says_that_it_is_not_trained(monkeypatch):
    """Its gradient is finite, so nothing else would tell. Zero and non-finite ones are no reason for a warning."""
    p = weight((40, 24))
    optimizer = FiraAdamW([{"params": [p], "rank": 4}], lr=1e-3)
    before = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (0.0, torch.nan):
            p.grad = torch.full_like(p, value)
            optimizer.step()
    with monkeypatch.context() as broken:
        broken.setattr(fira_hf.refresh, "find_bases", lambda grads, *_: [None] * len(grads))
        p.grad = gradients((40, 24), 1)[0]
        with pytest.warns(RuntimeWarning, match="No orthonormal basis .* 40 x 24, stays as it is"):
            optimizer.step()
    assert torch.equal(p, before)
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("refresh", ["staggered", "together"])
def test_a_random_first_basis_knows_nothing_of_the_gradient(refresh):
    p = weight((64, 48))
    optimizer = FiraAdamW([{"params": [p], "rank": 8, "projection": "random", "refresh": refresh}])
    optimizer.track_statistics = True
    p.grad = torch.outer(torch.arange(64.0), torch.arange(48.0))
    optimizer.step()
    assert optimizer.pop_statistics()["captured_energy"] < 0.6  # of the one direction that there is


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moments": "kept"},
        {"base_optimizer": "lion"},
        {"base_optimizer": "adafactor"},
        {"state_dtype": "bfloat16", "stochastic_rounding": True},
        {"state_dtype": "int8"},
        {"state_dtype": "int8", "base_optimizer": "adafactor"},
    ],
    ids=str,
)
def test_bases_that_change_together_are_those_of_matrices_one_by_one(settings, monkeypatch):
    """By the torch code for accelerators. At the second refresh one matrix has no gradient and one of NaN: these keep
    what they have."""
    shapes = [(40, 24)] * 4 + [(24, 40)]
    monkeypatch.setattr(fira_hf.matrices, "_operations", lambda device: F)
    change, sizes, results = fira_hf.refresh._change_bases, [], []
    monkeypatch.setattr(
        fira_hf.refresh, "_change_bases", lambda batch, *more: sizes.append(len(batch)) or change(batch, *more)
    )
    settings = {"moments": "rotated", "projection": "power"} | settings
    for together in (True, False):
        if not together:
            monkeypatch.setattr(fira_hf.matrices, "BATCH_ELSEWHERE", 1)
        sizes.clear()
        weights = [Pretended(weight(shape, seed=i).detach()) for i, shape in enumerate(shapes)]
        optimizer = optimizer_of(weights, gap=3, **settings)
        for t in range(8):
            for i, (p, gradient) in enumerate(zip(weights, noise(t, shapes), strict=True)):
                # One has made an update less than the others when their bases change.
                p.grad = {(1, 3): 0.0, (6, 1): 0.0, (6, 2): torch.nan}.get((t, i), 1.0) * gradient
            kept = [{name: x.clone() for name, x in optimizer.state[p].items() if torch.is_tensor(x)} for p in weights]
            optimizer.step()
            if t == 6:
                for p, before in zip(weights[1:3], kept[1:3], strict=True):
                    assert all(torch.equal(optimizer.state[p][name], x) for name, x in before.items())
        assert sizes == ([4, 1] if together else [1] * 5) * 2
        results.append([{"weight": p.detach(), **optimizer.state[p]} for p in weights])
    for one, other in zip(*results, strict=True):
        for name, x in one.items():
            if torch.is_tensor(x) and x.is_floating_point():
                torch.testing.assert_close(torch.Tensor(x), torch.Tensor(other[name]), rtol=1e-3, atol=1e-5)
            elif torch.is_tensor(x):  # a value between two codes may become the other one
                assert (x != other[name]).float().mean() < 0.01, name
            else:
                assert x == other[name], name
