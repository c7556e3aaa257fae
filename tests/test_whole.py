"""residual="moment": a first moment of the weight's size in fp32, bf16 or codes, and the preset made of it."""

import math

import pytest
import torch
from torch import nn

from conftest import launch
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer, views, whole
from fira_hf import functional as F
from fira_hf.config import PRESETS
from reference import assert_resumes, fira_step, gradients, spoiled, weight

SHAPES = {"tall": (70, 40), "wide": (40, 70), "square": (48, 48), "vector": (40, 1), "row": (1, 40)}
MOMENT = {"base_optimizer": "muon", "residual": "moment"}
PACKED = ["int8", "int4"]
of_shapes = pytest.mark.parametrize("kind", SHAPES)
of_dtypes = pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", *PACKED])


def optimizer_of(*params, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, **settings):
    group = {"rank": 6, "update_proj_gap": 5, **MOMENT, **settings}
    return FiraAdamW([{"params": list(params), **group}], lr=lr, betas=betas, weight_decay=weight_decay)


def moment_of(optimizer, p):
    """The moment as numbers."""
    state = optimizer.state[p]
    if "exp_avg_scale" not in state:
        return state["exp_avg"].float()
    return whole.decode(state["exp_avg"], state["exp_avg_scale"], p.shape[-1])


@of_dtypes
@pytest.mark.parametrize("rank", [6, 48])
def test_a_row_whose_gradient_has_stopped_comes_to_rest(rank, state_dtype):
    """As that of a neuron that has died: what is left of its moment is rounding noise in the end, and not to be
    brought to the size of other rows."""
    p, generator = weight((64, 48)), torch.Generator().manual_seed(0)
    optimizer = optimizer_of(p, rank=rank, state_dtype=state_dtype, weight_decay=0.0)
    for step in range(600):
        if step == 200:
            at_rest = p[3].clone()
        p.grad = 1e-2 * torch.randn(64, 48, generator=generator)
        p.grad[3] *= step < 5
        optimizer.step()
    assert (p[3] - at_rest).norm() < 1e-3 * (p[4] - weight((64, 48))[4]).norm()


# --------------------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 64), (3, 33), (2, 4, 31), (1, 1), (7, 96)])
def test_a_code_is_one_of_the_two_neighbours_and_their_mean_the_value(shape, bits):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 10, shape[-1])
    draws, found = torch.Generator().manual_seed(1), []
    for _ in range(400):
        codes, scales = whole.encode(values, bits, draws)
        assert (tuple(codes.shape), tuple(scales.shape)) == whole.packed_shapes(shape, bits)
        found.append(whole.decode(codes, scales, shape[-1]))
    found = torch.stack(found)
    steps = scales.float().repeat_interleave(whole.GROUP, dim=-1)[..., : shape[-1]]
    assert ((found - values).abs() <= 1.001 * steps).all()
    assert ((found.mean(0) - values).abs() <= 0.12 * steps).all()
    codes, scales = whole.encode(values, bits)
    assert ((whole.decode(codes, scales, shape[-1]) - values).abs() <= 0.501 * steps).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_small_codes_decay_at_a_beta_near_1(bits):
    """By a thousandth of themselves a step: a draw of few bits would round it up in each."""
    values, draws = torch.full((256, 32), 1.0), torch.Generator().manual_seed(0)
    values[:, 0] = 2 ** (bits - 1) - 1
    for _ in range(1000):
        values[:, 1:] *= 0.999
        values = whole.decode(*whole.encode(values, bits, draws), 32)
    assert values[:, 1:].mean() == pytest.approx(math.exp(-1), rel=0.1)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    for draws in (None, torch.Generator().manual_seed(0)):
        codes, scales = whole.encode(torch.zeros(3, 40), bits, draws)
        assert not whole.decode(codes, scales, 40).any()
    codes, scales = whole.packed_shapes((3, 40), bits)
    empty = torch.zeros(codes, dtype=torch.int8 if bits == 8 else torch.uint8)
    assert not whole.decode(empty, torch.zeros(scales, dtype=torch.bfloat16), 40).any()


# --------------------------------------------------------------------------- the equations


@of_shapes
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_every_step_against_the_equations(kind, alpha):
    """In fp64, with the basis that was found; whatever blocks the weight is gone through in."""
    shape = SHAPES[kind]
    p, state = weight(shape), {}
    start = W = p.detach().double()
    optimizer = optimizer_of(p, alpha=alpha)
    settings = {**MOMENT, "alpha": alpha, "rank": 6, "update_proj_gap": 1, "adjust_lr": "match_rms_adamw"}
    settings |= {"lr": 1e-2, "weight_decay": 0.1}
    for t, gradient in enumerate(gradients(shape, 13)):
        p.grad = gradient
        optimizer.step()
        # with a rank of the short side there is none: the whole space is its own
        basis = optimizer.state[p].get("basis", torch.eye(min(shape)))
        W, state, _ = fira_step(W, gradient, state, basis=basis, **settings)
        assert (p.detach().double() - W).norm() <= 1e-4 * (W - start).norm(), t
        moment = views.tall(optimizer.state[p]["exp_avg"]).double()
        assert (moment - state["exp_avg"]).norm() <= 1e-5 * state["exp_avg"].norm()
    assert optimizer.state[p]["step"] == 13


@of_shapes
@of_dtypes
def test_blocks_of_rows_change_nothing(kind, state_dtype, monkeypatch):
    """But for the draws, which are made block by block."""
    found = []
    for size in (2**20, 32):
        monkeypatch.setattr(whole, "BLOCK", size)
        monkeypatch.setattr(F, "generator", lambda like, seed: None)
        p = weight(SHAPES[kind])
        start = p.detach().clone()
        optimizer = optimizer_of(p, state_dtype=state_dtype)
        for gradient in gradients(SHAPES[kind], 3):
            p.grad = gradient
            optimizer.step()
        found.append(p.detach().clone())
    assert (found[0] - found[1]).norm() <= 1e-4 * (found[0] - start).norm()


@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
@pytest.mark.parametrize("rank", [1, 39, 1000])
def test_ranks_up_to_and_beyond_the_short_side(kind, rank):
    p = weight(SHAPES[kind])
    optimizer = optimizer_of(p, rank=rank)
    for gradient in gradients(SHAPES[kind], 6):
        p.grad = gradient
        optimizer.step()
    # of a matrix of singular values 1 the root mean square is 0.2, whatever the rank
    before = p.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert ((p - before).square().mean().sqrt() / 1e-2).item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_at_full_rank_it_is_torchs_muon_with_equal_rows(kind):
    """And keeps no basis. torch iterates in bf16, whose rounding is two percent in a step, and less in many."""
    shape, moved, expected = SHAPES[kind], 0, 0
    ours, theirs = weight(shape), weight(shape)
    optimizer = optimizer_of(ours, rank=100, betas=(0.95, 0.999), weight_decay=0.0)
    muon = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients(shape, 20):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(), muon.step()
        one, other = (views.tall(p.detach() - start) for p, start in zip((ours, theirs), before, strict=True))
        moved = moved + one
        expected = expected + 1e-2 * 0.2 * math.sqrt(min(shape)) * torch.nn.functional.normalize(other, dim=1)
    assert (moved - expected).norm() <= 0.01 * expected.norm()
    assert "basis" not in optimizer.state[ours]


def test_a_row_without_a_gradient_stays():
    p = weight((70, 40))
    optimizer = optimizer_of(p, rank=40, weight_decay=0.0)
    start = p.detach().clone()
    for gradient in gradients((70, 40), 3):
        gradient[11] = 0
        p.grad = gradient
        optimizer.step()
    moved = (p.detach() - start).norm(dim=1)
    assert moved[11] == 0 and (moved > 0).sum() == 69


def test_the_basis_follows_the_moment_and_not_the_gradient():
    """A direction that all gradients share is in it, though in each one noise is far larger."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in (120, 80))
    p = nn.Parameter(torch.zeros(120, 80))
    optimizer = optimizer_of(p, rank=4, betas=(0.98, 0.999))
    for _ in range(120):
        p.grad = 0.8 * torch.outer(left, right) + 0.1 * torch.randn(120, 80, generator=generator)
        optimizer.step()
    inside = (optimizer.state[p]["basis"].T @ right).norm()
    assert inside > 0.95


def test_a_gradient_of_low_rank_leaves_next_to_no_residual():
    """What is left of it is rounding, and no row of rounding is brought to the size of the others."""
    generator = torch.Generator().manual_seed(0)
    p = weight((70, 40))
    optimizer = optimizer_of(p, rank=6, weight_decay=0.0)
    right = torch.randn(4, 40, generator=generator)
    for _ in range(8):
        p.grad = torch.randn(70, 4, generator=generator) @ right
        before = p.detach().clone()
        optimizer.step()
    moved = p.detach() - before
    outside = moved - moved @ torch.linalg.pinv(right) @ right
    assert outside.norm() < 0.02 * moved.norm()


@of_dtypes
def test_no_row_is_larger_than_the_others_where_little_is_left(state_dtype):
    """A basis that is not orthonormal to rounding tells little of a small rest: it may look like none at all."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(256, 128))
    optimizer = optimizer_of(p, rank=16, update_proj_gap=10, lr=1.0, weight_decay=0.0, state_dtype=state_dtype)
    left, right = torch.randn(256, 16, generator=generator), torch.randn(16, 128, generator=generator)
    for _ in range(8):
        steady = left * torch.randn(16, generator=generator) @ right
        p.grad = steady + 0.03 * torch.randn(256, 128, generator=generator)
        before = p.detach().clone()
        optimizer.step()
    rows = (p.detach() - before).norm(dim=1) / (0.2 * math.sqrt(256))  # all of size sqrt(128 / 256) at most
    assert rows.max() < 1.2 * math.sqrt(128 / 256)


@of_dtypes
def test_a_first_gradient_of_low_rank_is_no_reference_of_the_limiter(state_dtype):
    """The residual would have to grow from nothing, by gamma a step."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        p = nn.Parameter(torch.zeros(64, 32))
        optimizer = optimizer_of(p, rank=8, gamma=1.01, state_dtype=state_dtype)
        optimizer.track_statistics = True
        for step in range(4):
            p.grad = torch.randn(64, 32, generator=generator)
            if step == 0:
                p.grad[:, 2:] = 0
            optimizer.step()
            share = optimizer.pop_statistics()["residual_share"]
        assert share > 0.6, seed


# --------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("state_dtype", ["bfloat16", *PACKED])
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_a_coarser_moment_follows_that_in_fp32(kind, state_dtype):
    """Even where a step moves it by less than a code: its mean is what counts."""
    shape = SHAPES[kind]
    fine, coarse = weight(shape), weight(shape)
    one, other = (
        optimizer_of(fine, betas=(0.98, 0.999)),
        optimizer_of(coarse, state_dtype=state_dtype, betas=(0.98, 0.999)),
    )
    constant = gradients(shape, 1)[0]
    for _ in range(150):
        fine.grad, coarse.grad = constant.clone(), constant.clone()
        one.step(), other.step()
    exact, found = moment_of(one, fine), moment_of(other, coarse)
    assert ((found * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=0.02)
    # what a step rounds, 0.4 of a code, stays for 1 / (1 - 0.98^2) steps
    noise = {"bfloat16": 0.02, "int8": 0.05, "int4": 0.5}
    assert (found - exact).norm() <= noise[state_dtype] * exact.norm()
    assert other.state[coarse]["basis"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(70, 40), (40, 70), (3, 70, 40), (64, 96)])
@pytest.mark.parametrize("rank", [6, 1000])
def test_bytes_of_the_state(shape, rank):
    """A 4-bit moment is 9/16 of a byte a weight, filled up to groups of 32."""
    p = nn.Parameter(torch.randn(shape))
    optimizer = optimizer_of(p, state_dtype="int4", rank=rank)
    p.grad = torch.randn(shape)
    optimizer.step()
    *outer, last = shape
    groups = math.prod(outer) * -(-last // 32)
    state = {name: value for name, value in optimizer.state[p].items() if torch.is_tensor(value)}
    assert set(state) == {"exp_avg", "exp_avg_scale", "step", "residual_norm", *(("basis",) if rank == 6 else ())}
    assert state["exp_avg"].nbytes + state["exp_avg_scale"].nbytes == 18 * groups
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_scale"].dtype == torch.bfloat16
    if shape == (64, 96):
        assert (state["exp_avg"].nbytes + state["exp_avg_scale"].nbytes) / p.numel() == 9 / 16


@of_dtypes
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e30])
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_a_bad_gradient_changes_nothing(at, bad, state_dtype):
    """Of 1e30 the square is not in fp32."""
    p = weight((70, 40))
    optimizer = optimizer_of(p, state_dtype=state_dtype)
    for t, gradient in enumerate(gradients((70, 40), 9)):
        before = p.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if torch.is_tensor(v)}
        p.grad = spoiled(gradient, bad) if t == at else gradient
        optimizer.step()
        assert torch.equal(p, before) == (t == at)
        if t == at:
            assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())
    assert p.isfinite().all() and moment_of(optimizer, p).isfinite().all()


@of_dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"rank": 100}, {"split": 2}, {"split": 2, "transposed": True}])
def test_a_resumed_run_ends_in_the_same_bits(settings, dtype, state_dtype):
    shape = (40, 64)
    settings, grads = {"state_dtype": state_dtype, **settings}, [[gradient] for gradient in gradients(shape, 12)]
    p = weight(shape, dtype=dtype)
    assert_resumes(lambda params: optimizer_of(*params, **settings), [p], grads, stop=7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (128, 40)])
def test_parts_are_trained_as_matrices_by_themselves(shape, transposed):
    """Each with its part of the moment, which lies as the weight does."""
    whole_weight = weight(shape)
    stored = nn.Parameter(whole_weight.detach().t().clone()) if transposed else whole_weight
    apart = [nn.Parameter(part.clone()) for part in whole_weight.detach().chunk(2)]
    one = optimizer_of(stored, split=2, transposed=transposed, refresh="together")
    other = optimizer_of(*apart, refresh="together")
    for gradient in gradients(shape, 8):
        stored.grad = gradient.t().clone() if transposed else gradient
        for p, part in zip(apart, gradient.chunk(2), strict=True):
            p.grad = part.clone()
        one.step(), other.step()
    parts = torch.cat(apart)
    # bases begin at random sums of rows, with other seeds
    assert (parts - (stored.t() if transposed else stored)).norm() <= 0.05 * (parts - weight(shape)).norm()


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_optimizer": "adamw"}, "base_optimizer='adamw'.*takes base_optimizer='muon'"),
        ({"scaling": "matrix"}, "scaling='matrix'"),
        ({"moments": "kept"}, "moments='kept'"),
        ({"projection": "columns"}, "projection='columns'"),
        ({"projection": "svd"}, "projection='svd'"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"residual": "reference", "state_dtype": "int4"}, "state_dtype='int4'.*subspace-muon"),
        ({"state_dtype": "int2"}, "state_dtype='int2'"),
    ],
)
def test_what_does_not_go_together(settings, words):
    with pytest.raises(ValueError, match=words):
        FiraConfig(**MOMENT | settings)
    with pytest.raises(ValueError, match=words):
        optimizer_of(weight((40, 24)), **settings)


def test_parts_that_groups_of_codes_straddle_are_refused():
    p = weight((64, 80))
    with pytest.raises(ValueError, match="split=2.*transposed.*multiple of 32.*state_dtype='bfloat16'"):
        optimizer_of(p, split=2, transposed=True, state_dtype="int4")
    optimizer_of(p, split=2, transposed=True, state_dtype="bfloat16")
    optimizer_of(p, split=2, state_dtype="int4")


def test_a_checkpoint_of_another_dtype_is_refused():
    p = weight((40, 24))
    saved, other = (optimizer_of(p, state_dtype=dtype) for dtype in PACKED)
    for optimizer in (saved, other):
        p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.raises(ValueError, match="state_dtype='int8'"):
        other.load_state_dict(saved.state_dict())


def test_the_presets():
    for name in ("subspace-muon", "muon-4bit"):
        config = FiraConfig(**PRESETS[name])
        assert (config.base_optimizer, config.residual, config.state_dtype) == ("muon", "moment", "int4")
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 32, bias=False), nn.Linear(32, 5))
    optimizer = get_fira_optimizer(model, config)
    assert "1 at rank 64, 1 at rank 32" in optimizer.summary
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    sizes = [sum(x.nbytes for x in state.values() if torch.is_tensor(x)) for state in optimizer.state.values()]
    assert sizes[:2] == [64 * 96 * 9 // 16 + 8, 96 * 32 * 9 // 16 + 8]


# --------------------------------------------------------------------------- several processes

SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from fira_hf import FiraAdamW, whole

dist.init_process_group("gloo")
world = dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
of_moment = {"base_optimizer": "muon", "residual": "moment"}
for tolerance, settings in (
    (1e-3, {**of_moment, "rank": 4, "state_dtype": "float32"}),
    (0.5, {**of_moment, "rank": 4, "state_dtype": "int4"}),
    (1e-3, {**of_moment, "rank": 99, "state_dtype": "float32"}),
    (0.1, {"rank": 4, "state_dtype": "int8"}),  # low-rank moments in codes: see test_codes.py
    (1e-4, {"rank": 4, "projection": "columns"}),  # a block of columns may lie on two processes: see test_columns.py
    (1e-4, {"rank": 4, "projection": "columns", "base_optimizer": "muon"}),
):
    for shape in ((26, 10), (10, 26), (90, 70), (70, 90), (12, 12), (5, 20, 12)):
        torch.manual_seed(0)
        single = torch.nn.Parameter(torch.randn(shape))
        part = torch.nn.Parameter(distribute_tensor(single.detach().clone(), mesh, [Shard(0)]))
        group = {"update_proj_gap": 3, **settings}
        start = single.detach().clone()
        a, b = (FiraAdamW([{"params": [p], **group}], lr=1e-2) for p in (single, part))
        common = torch.randn(shape)  # a trend, so that the rounding of codes does not decide the direction
        for step in range(10):
            single.grad = 3 * common + torch.randn(shape)
            part.grad = distribute_tensor(single.grad.clone(), mesh, [Shard(0)])
            a.step(), b.step()
        error = (part.full_tensor() - single).norm() / (single - start).norm()
        assert error <= tolerance, (settings, shape, error)
        for name, value in b.state[part].items():
            if torch.is_tensor(value) and name.startswith("exp_avg"):
                assert value.full_tensor().shape == a.state[single][name].shape, name
        if len(shape) == 2:  # a gradient that is bad on one process changes nothing on any
            before = part.full_tensor()
            single.grad[0, 0] = torch.nan
            part.grad = distribute_tensor(single.grad.clone(), mesh, [Shard(0)])
            b.step()
            assert torch.equal(before, part.full_tensor())
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_weights_move_as_whole_ones(processes, tmp_path):
    launch(SHARDED, tmp_path, processes)


@pytest.mark.parametrize(("limiter", "gamma"), [("growth", 2.0), ("shrink", 0.9), ("scale", 0.9)])
def test_a_residual_of_zero_is_left_alone_by_every_limiter(limiter, gamma):
    """At full rank nothing is left of the moment."""
    p = weight((12, 8))
    settings = {"base_optimizer": "muon", "residual": "moment", "limiter": limiter, "gamma": gamma}
    optimizer = FiraAdamW([{"params": [p], "rank": 8, **settings}])
    for _ in range(3):
        p.grad = torch.ones(12, 8).tril()
        optimizer.step()
    assert p.isfinite().all()
