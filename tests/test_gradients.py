"""Gradients that are zero, not finite, huge, tiny or inside the subspace: where the published package fails."""

import math

import pytest
import torch
from fira import FiraAdamW as Published

from fira_hf import PUBLISHED, FiraAdamW
from reference import fira_step, gradients, spoiled, weight

SHAPES = [(40, 24), (24, 40)]
GROUP = {"rank": 6, "update_proj_gap": 5, "alpha": 1.0}
OURS = {**PUBLISHED, **GROUP}


def make(parameter, projected=True, cls=FiraAdamW):
    if cls is Published:
        group = GROUP | {"proj_type": "std"} if projected else {}
        return Published([{"params": [parameter], **group}], lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)
    return FiraAdamW([{"params": [parameter], **(OURS if projected else {})}], lr=1e-2, weight_decay=0.1)


def step(optimizer, parameter, gradient):
    parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def snapshot(optimizer, parameter):
    """Everything that training depends on; refresh_in is a bound on calls, which a skipped call may lower."""
    state = {k: v.clone() for k, v in optimizer.state.get(parameter, {}).items() if torch.is_tensor(v)}
    return {"weight": parameter.detach().clone(), **state}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", [1, 7])
def test_zero_first_gradients_cost_nothing(zeros, shape):
    delayed, fresh = weight(shape), weight(shape)
    a, b = make(delayed), make(fresh)
    for _ in range(zeros):
        step(a, delayed, torch.zeros(shape))
    assert not a.state.get(delayed)
    assert torch.equal(delayed, fresh)
    for gradient in gradients(shape, 8):
        step(a, delayed, gradient)
        step(b, fresh, gradient)
        assert_same(snapshot(a, delayed), snapshot(b, fresh))


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_at_full_strength_after_a_zero_first_gradient(shape):
    gradient = gradients(shape, 1)[0]
    _, full, _ = fira_step(weight(shape).detach().double(), gradient, {}, **GROUP)
    ours, theirs = weight(shape), weight(shape)
    a, b = make(ours), make(theirs, cls=Published)
    for g in (torch.zeros(shape), gradient):
        step(a, ours, g)
        step(b, theirs, g)
    assert a.state[ours]["residual_norm"] == pytest.approx(full["residual_norm"].item(), rel=1e-4)
    assert b.state[theirs]["scaling_grad"] < 1e-3 * full["residual_norm"]  # the defect that is mended here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 4, 5, 6])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_bad_gradient_changes_nothing_and_the_next_one_works(shape, bad, at, dtype):
    """After 1, 4 and 6 updates between refreshes, after 5 at one."""
    parameter, without = weight(shape, dtype=dtype), weight(shape, dtype=dtype)
    a, b = make(parameter), make(without)
    sequence = gradients(shape, 12)
    for t, gradient in enumerate(sequence):
        if t == at:
            bad_gradient = spoiled(gradient, bad)
            before = snapshot(a, parameter)
            step(a, parameter, bad_gradient)
            step(a, parameter, bad_gradient)
            assert_same(snapshot(a, parameter), before)
        step(a, parameter, gradient)
        step(b, without, gradient)
    assert_same(snapshot(a, parameter), snapshot(b, without))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_first_gradient_not_finite(everywhere, bad):
    shape = (40, 24)
    parameter, without = weight(shape), weight(shape)
    a, b = make(parameter), make(without)
    first = torch.full(shape, bad) if everywhere else torch.zeros(shape)
    first[0, 0] = bad
    step(a, parameter, first)
    assert not a.state.get(parameter)
    assert torch.equal(parameter, without)
    for gradient in gradients(shape, 7):
        step(a, parameter, gradient)
        step(b, without, gradient)
    assert_same(snapshot(a, parameter), snapshot(b, without))


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dense_group_is_skipped_as_a_whole(bad, at):
    first, second, matrix = weight((7,)), weight((5, 3)), weight((40, 24))
    untouched = [p.detach().clone() for p in (first, second, matrix)]
    optimizer = FiraAdamW([{"params": [first, second]}, {"params": [matrix], **OURS}], lr=1e-2, weight_decay=0.1)
    reference = [torch.nn.Parameter(p.clone()) for p in untouched[:2]]
    adam = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1, eps=1e-6)
    sequence = gradients((40, 24), 6)
    for t in range(6):
        matrix.grad = sequence[t]
        for p, q in zip((first, second), reference, strict=True):
            p.grad, q.grad = torch.full_like(p, 0.1 + t), torch.full_like(q, 0.1 + t)
        if t == at:
            second.grad[2, 1] = bad
            dense = [snapshot(optimizer, p) for p in (first, second)]
            before = matrix.detach().clone()
            optimizer.step()
            for p, old in zip((first, second), dense, strict=True):
                new = snapshot(optimizer, p)
                assert_same({k: new[k] for k in old}, old)
                # state that was not there before may be there now, but empty
                assert all(not new[k].any() for k in new.keys() - old.keys())
            assert not torch.equal(matrix, before)  # the other group goes on
        else:
            optimizer.step()
            adam.step()
    for p, q in zip((first, second), reference, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("projected", [True, False])
def test_what_the_published_package_does_with_them(projected, bad):
    """It raises where a basis is due, and turns the weights to NaN elsewhere: why the tests above exist."""
    shape = (40, 24)
    for at in (0, 1):
        parameter = weight(shape)
        optimizer = make(parameter, projected, Published)
        sequence = gradients(shape, 2)
        sequence[at][3, 7] = bad
        raised = False
        for gradient in sequence:
            try:
                step(optimizer, parameter, gradient)
            except torch.linalg.LinAlgError:
                raised = True
        assert raised == (projected and at == 0)
        assert raised or parameter.isnan().any()


@pytest.mark.parametrize("scaling", ["column", "matrix", "none"])
@pytest.mark.parametrize("size", [1e15, 1e-20, 1e-30])
@pytest.mark.parametrize("shape", SHAPES)
def test_huge_and_tiny_gradients_stay_finite(shape, size, scaling):
    parameter = weight(shape)
    start = parameter.detach().clone()
    optimizer = FiraAdamW([{"params": [parameter], **OURS, "scaling": scaling, "gamma": 1.01}], lr=1e-3)
    for gradient in gradients(shape, 7):
        step(optimizer, parameter, size * gradient)
        assert parameter.isfinite().all()
        for name, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                assert name == "residual_norm" or value.isfinite().all(), name
                assert not value.isnan().any(), name
    if size == 1e15 and scaling != "none":
        # Adam's direction does not know the size: as with gradients of size one
        same = weight(shape)
        other = FiraAdamW([{"params": [same], **OURS, "scaling": scaling}], lr=1e-3, eps=1e-21)
        for gradient in gradients(shape, 7):
            step(other, same, gradient)
        assert (parameter - same).norm() <= 1e-3 * (same - start).norm()
    if size < 1e-10:
        assert torch.equal(parameter, start)  # far below eps: an update of 1e-10 of the weights is below their ulp


@pytest.mark.parametrize("projected", [True, False])
def test_fp16_gradient_whose_norm_is_beyond_fp16(projected):
    """Its elements are finite, and so it is stepped."""
    shape = (40, 24)
    half, full = weight(shape, dtype=torch.float16), weight(shape)
    full.data.copy_(half.data)
    start = full.detach().clone()
    gradient = gradients(shape, 1)[0]
    gradient = (gradient / gradient.abs().max() * 6e4).half()
    assert gradient.isfinite().all()
    assert gradient.norm().isinf()
    for parameter in (half, full):
        step(make(parameter, projected), parameter, gradient)
    assert (full - start).norm() > 0
    # rounded once, to half a unit in the last place
    assert torch.allclose(half.float(), full, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e25, 1e38])
@pytest.mark.parametrize("projected", [True, False])
def test_gradient_whose_square_overflows_does_no_harm(projected, size):
    """Finite in fp32, but not its second moment."""
    shape = (40, 24)
    parameter = weight(shape)
    optimizer = make(parameter, projected)
    sequence = gradients(shape, 8)
    for t, gradient in enumerate(sequence):
        step(optimizer, parameter, gradient.clamp(-1, 1) * size if t in (0, 3, 5) else gradient)
        assert parameter.isfinite().all(), t
        assert not any(v.isnan().any() for v in optimizer.state.get(parameter, {}).values() if torch.is_tensor(v)), t


@pytest.mark.parametrize("projected", [True, False])
def test_a_gradient_counts_as_long_as_the_square_of_its_norm_is_finite(projected):
    """Beyond, Adam's second moment would be infinite, and the weight stand still for ever."""
    parameter = weight((40, 24))
    optimizer = make(parameter, projected)
    made = 0
    for size, counts in ((1e20, False), (1e18, True), (1e20, False)):
        before, made = parameter.detach().clone(), made + counts
        step(optimizer, parameter, torch.zeros(40, 24).index_fill_(0, torch.tensor(3), size))
        assert torch.equal(parameter, before) != counts
        assert optimizer.state.get(parameter, {}).get("step", 0) == made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at", [0, 5, 7])
def test_residual_that_is_zero_once_does_not_lock_the_limiter(at, shape):
    """The gradient of step `at` lies in the subspace: rank 3 at a refresh, or made of the basis between two."""
    ours, theirs = weight(shape), weight(shape)
    a, b = make(ours), make(theirs, cls=Published)
    sequence = gradients(shape, at + 2)
    for t, gradient in enumerate(sequence):
        if t == at:
            if at % 5 == 0:
                u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
                gradient = ((u[:, :3] * s[:3]) @ v[:3]).float()
            else:
                Q = a.state[ours]["basis"].double()
                inside = gradient.double() @ Q @ Q.T if shape[0] >= shape[1] else Q @ Q.T @ gradient.double()
                gradient = inside.float()
        if t == at + 1:
            state = {k: v.double() for k, v in a.state[ours].items() if torch.is_tensor(v)}
            assert torch.isinf(state["residual_norm"])
            state["residual_norm"] = torch.tensor(math.inf)
            _, free, _ = fira_step(ours.detach().double(), gradient, state, **GROUP)
        step(a, ours, gradient)
        step(b, theirs, gradient)
    assert a.state[ours]["residual_norm"] == pytest.approx(free["residual_norm"].item(), rel=1e-4)
    assert b.state[theirs]["scaling_grad"] < 1e-3 * free["residual_norm"]  # the published limiter is locked


def test_one_row_of_zeros_does_not_stop_the_others():
    """An embedding-like gradient: rows without a gradient are rows without an update."""
    shape = (40, 24)
    parameter = weight(shape)
    optimizer = FiraAdamW([{"params": [parameter], **OURS}], lr=1e-2)
    start = parameter.detach().clone()
    for gradient in gradients(shape, 7):
        gradient[5] = 0
        step(optimizer, parameter, gradient)
    assert parameter.isfinite().all()
    assert torch.equal(parameter[5], start[5])
    assert (parameter - start).norm(dim=1)[6:].min() > 0
