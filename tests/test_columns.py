"""projection="columns" and base_optimizer="muon": a block of neighbouring columns as the subspace, and Muon in it."""

import math
import re

import pytest
import torch

from fira_hf import FiraAdamW, base_optimizers, views
from fira_hf.matrices import matrices_of
from reference import fira_step, gradients, spoiled, weight

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
of_shapes = pytest.mark.parametrize("kind", SHAPES)


def optimizer_of(*params, lr=1e-2, betas=(0.9, 0.99), **settings):
    group = {"rank": 6, "update_proj_gap": 5, "projection": "columns", "alpha": 0.25, **settings}
    return FiraAdamW([{"params": list(params), **group}], lr=lr, betas=betas, weight_decay=0.1)


def columns_of(optimizer, p):
    """The columns that the next step uses, of each matrix of a weight."""
    (group,) = optimizer.param_groups
    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [list(matrix.columns(group)) for matrix in matrices_of(p, optimizer.state, group)]


# --------------------------------------------------------------------------- Muon


@of_shapes
@pytest.mark.parametrize("projection", ["columns", "power"])
def test_with_the_whole_space_it_is_torchs_muon(kind, projection):
    """Which iterates in bf16: after 40 steps that is half a percent of the movement."""
    ours, theirs = weight(SHAPES[kind]), weight(SHAPES[kind])
    start = theirs.detach().clone()
    settings = {"rank": 100, "base_optimizer": "muon", "projection": projection, "alpha": 1.0}
    optimizer = FiraAdamW([{"params": [ours], **settings}], lr=1e-2, betas=(0.95, 0.999))
    muon = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients(SHAPES[kind], 40):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(), muon.step()
    assert (ours - theirs).norm() <= 0.02 * (theirs - start).norm()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e12])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_singular_values_come_near_1_and_vectors_stay(condition, size):
    """What the iteration on the matrix itself gives in fp64, however many singular values are next to nothing."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 24, dtype=torch.float64, generator=generator)).Q for n in (90, 24))
    X = size * (U * torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)) @ V.T
    a, b, c = base_optimizers.NEWTON_SCHULZ
    exact = X / X.norm()
    for _ in range(base_optimizers.NEWTON_SCHULZ_STEPS):
        A = exact.T @ exact
        exact = a * exact + exact @ (b * A + c * A @ A)
    (found,) = base_optimizers.orthogonalized(X.float()[None])
    assert (found.double() - exact).norm() <= 1e-3 * exact.norm()
    if condition <= 100:
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.25
        (found,) = base_optimizers.orthogonalized_in_bf16(X.float()[None])
        assert (found.double() - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("orthogonalized", [base_optimizers.orthogonalized, base_optimizers.orthogonalized_in_bf16])
def test_a_moment_of_low_rank_or_none_stays_finite(orthogonalized):
    left = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(torch.cat([left @ torch.ones(2, 3, 8), torch.zeros(1, 90, 8)]))
    assert found.isfinite().all() and found[0].norm() > 0.5 and not found[2].any()


def test_processes_on_cpus_of_two_kinds_add_up_as_often(monkeypatch):
    """Or each would wait for a sum that the other does not make."""
    X, sums = torch.randn(1, 300, 260, generator=torch.Generator().manual_seed(0)), []
    for has_units in (False, True):
        monkeypatch.setattr(base_optimizers, "MULTIPLIES_BF16", has_units)
        base_optimizers.orthogonalized(X, add=lambda A: sums.append(A.shape) or A)
    assert sums == [(1, 260, 260)] * 2


# --------------------------------------------------------------------------- the equations


@of_shapes
@pytest.mark.parametrize("residual", ["reference", "paper", "none"])
@pytest.mark.parametrize("base", ["adamw", "lion", "adafactor", "muon"])
def test_every_step_against_the_equations(kind, residual, base):
    """In fp64, with the basis that picks the columns; moments and the count of updates begin anew with a block."""
    p, state = weight(SHAPES[kind]), {}
    start = W = p.detach().double()
    common = {"base_optimizer": base, "residual": residual, "alpha": 0.25}
    optimizer = optimizer_of(p, refresh="together", **common)
    changes = 0
    for t, gradient in enumerate(gradients(SHAPES[kind], 23)):
        p.grad = gradient
        optimizer.step()
        first = columns_of(optimizer, p)[0][0]
        if t % 5 == 0:
            state = {"residual_norm": state["residual_norm"]} if state else {}
            changes += 1
        Q = torch.eye(min(SHAPES[kind]), dtype=torch.float64)[:, first : first + 6]
        settings = {**common, "rank": 6, "update_proj_gap": 1, "gamma": 2.0, "adjust_lr": "match_rms_adamw"}
        settings |= {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
        W, state, _ = fira_step(W, gradient, state, basis=Q, **settings)
        assert (p.detach().double() - W).norm() <= 1e-4 * (W - start).norm(), t
    assert changes == 5 and optimizer.state[p]["step"] == 3


@of_shapes
def test_columns_outside_the_block_only_get_the_residual(kind):
    shape = SHAPES[kind]
    p = weight(shape)
    optimizer = optimizer_of(p, residual="none", base_optimizer="muon")
    optimizer.param_groups[0]["weight_decay"] = 0.0
    p.grad = gradients(shape, 1)[0]
    before = p.detach().clone()
    optimizer.step()
    moved = views.tall((p - before).detach()).abs().sum(0).nonzero().flatten().tolist()
    assert moved == columns_of(optimizer, p)[0]


# --------------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_every_block_comes_as_often_as_any_other(refresh):
    parameters = [weight(shape, seed=i) for i, shape in enumerate([(40, 24), (24, 40), (30, 26), (3, 5)])]
    optimizer = optimizer_of(*parameters, refresh=refresh)
    seen = {p: [] for p in parameters}
    for t in range(1 + 5 * 20):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in parameters:
            (now,) = columns_of(optimizer, p)
            if not seen[p] or seen[p][-1] != now or (refresh == "together" and t and t % 5 == 0):
                seen[p].append(now)
    for p in parameters:
        short = min(p.shape)
        count = -(-short // 6)
        if count == 1 and refresh == "staggered":
            assert seen[p] == [list(range(short))]
            continue
        of_round = [tuple(block) for block in seen[p][1 : 1 + count]]
        assert len(set(of_round)) == count  # each once, then in the same order again
        assert [tuple(block) for block in seen[p][1 + count : 1 + 2 * count]] in (of_round, [])
        assert set().union(*of_round) == set(range(short))  # the last one is as wide as the others
        assert all(len(block) == min(6, short) for block in of_round)
    if refresh == "together":
        orders = {tuple(block[0] for block in seen[p][:4]) for p in parameters[:2]}
        assert len(orders) == 2  # drawn for each by itself


def test_staggered_blocks_do_not_change_at_once():
    parameters = [weight((40, 24), seed=i) for i in range(10)]
    optimizer = optimizer_of(*parameters, refresh="staggered")
    changed, last = [], None
    for _ in range(11):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        now = [columns_of(optimizer, p) for p in parameters]
        changed.append(0 if last is None else sum(a != b for a, b in zip(last, now, strict=True)))
        last = now
    assert changed[1:] == [2] * 10


def test_the_matrices_of_a_stack_have_turns_of_their_own():
    stack = torch.nn.Parameter(torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0)))
    optimizer = optimizer_of(stack, refresh="together")
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    orders = []
    for _ in range(4):
        orders.append([block[0] for block in columns_of(optimizer, stack)])
        for _ in range(5):
            optimizer.step()
    assert len(set(zip(*orders, strict=True))) > 1


# --------------------------------------------------------------------------- what is kept


def test_there_is_no_basis_and_moments_begin_anew():
    p = weight((40, 24))
    optimizer = optimizer_of(p, base_optimizer="muon", refresh="together")
    for t, gradient in enumerate(gradients((40, 24), 6)):
        p.grad = gradient
        optimizer.step()
        state = optimizer.state[p]
        assert {k: tuple(v.shape) for k, v in state.items() if torch.is_tensor(v)} == {
            "exp_avg": (40, 6),
            "step": (),
            "residual_norm": (),
        }
        if t in (0, 5):
            (columns,) = columns_of(optimizer, p)
            assert torch.allclose(state["exp_avg"], 0.1 * gradient[:, columns])
            assert state["step"] == 1


def test_kept_moments_go_on():
    p = weight((40, 24))
    optimizer = optimizer_of(p, base_optimizer="muon", refresh="together", moments="kept")
    for gradient in gradients((40, 24), 6):
        p.grad = gradient
        before = optimizer.state[p]["exp_avg"].clone() if optimizer.state else None
        optimizer.step()
    (columns,) = columns_of(optimizer, p)
    assert torch.allclose(optimizer.state[p]["exp_avg"], 0.9 * before + 0.1 * gradient[:, columns], atol=1e-7)
    assert optimizer.state[p]["step"] == 6


def test_a_rank_of_the_whole_side_is_never_begun_anew():
    p = weight((40, 24))
    optimizer = optimizer_of(p, rank=24)
    for gradient in gradients((40, 24), 12):
        p.grad = gradient
        optimizer.step()
    assert optimizer.state[p]["step"] == 12


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_a_bad_gradient_is_never_written(at, bad):
    """At the step in which a block's turn ends (5), its moments are dropped all the same: the next one's begin."""
    shape = (40, 24)
    p = weight(shape)
    optimizer = optimizer_of(p, base_optimizer="muon", refresh="together")
    for t, gradient in enumerate(gradients(shape, 9)):
        before = p.detach().clone()
        moment = optimizer.state[p]["exp_avg"].clone() if p in optimizer.state else None
        p.grad = spoiled(gradient, bad) if t == at else gradient
        optimizer.step()
        if t == at:
            assert torch.equal(p, before)
            if at == 0:
                assert not optimizer.state
            else:
                assert torch.equal(optimizer.state[p]["exp_avg"], 0 * moment if at == 5 else moment)
        else:
            assert not torch.equal(p, before)
    assert p.isfinite().all()


def test_a_checkpoint_of_another_subspace_is_refused():
    p = weight((40, 24))
    saved, other = optimizer_of(p), optimizer_of(p, projection="random")
    for optimizer in (saved, other):
        p.grad = torch.ones_like(p)
        optimizer.step()
    for one, another in ((saved, other), (other, saved)):
        with pytest.raises(ValueError, match=re.escape("projection=")):
            one.load_state_dict(another.state_dict())


def test_the_default_device_of_torch_decides_nothing():
    p = weight((12, 8))
    optimizer = FiraAdamW([{"params": [p], "rank": 2, "projection": "columns", "update_proj_gap": 1}])
    p.grad = torch.ones(12, 8)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert p.device.type == "cpu" and (p != weight((12, 8))).any()
