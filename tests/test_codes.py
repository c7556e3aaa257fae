"""state_dtype="int8": low-rank moments and bases as codes, for every base optimizer."""

import math

import pytest
import torch
from torch import nn

from fira_hf import FiraAdamW, FiraConfig, base_optimizers, codes, whole
from fira_hf import functional as F
from fira_hf.codes import BASIS, CODES, SECOND, value
from recipes.benchmarks.models import Pretended
from reference import assert_resumes, fira_step, gradients, spoiled, weight
from test_accelerator import no_reads

BASES = ["adamw", "lion", "adafactor", "muon"]
of_bases = pytest.mark.parametrize("base", BASES)


def optimizer_of(*params, lr=1e-2, **settings):
    return FiraAdamW(
        [{"params": list(params), "rank": 6, "update_proj_gap": 5, "state_dtype": "int8", **settings}], lr
    )


def train(optimizer, p, sequence):
    for gradient in sequence:
        p.grad = gradient.clone().to(p.dtype)
        optimizer.step()


def tensors(state):
    return {name: tensor.clone() for name, tensor in state.items() if torch.is_tensor(tensor)}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_what_rounding_the_basis_leaves_of_a_residual_limits_no_later_one(state_dtype):
    """The first gradients lie in the subspace, and what seems to be outside is an error of the closed form."""
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 4, 16):
        for _ in range(20):
            p = weight((96, 64))
            optimizer = FiraAdamW([{"params": [p], "rank": 32, "state_dtype": state_dtype}])
            p.grad = torch.randn(96, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
            optimizer.step()
            assert optimizer.state[p]["residual_norm"] == math.inf, rank


# --------------------------------------------------------------------------- codes


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("r", [1, 31, 32, 70])
def test_a_code_is_one_of_the_two_neighbours_and_their_mean_the_value(code, r):
    """Over 16 decades, and in a group of its own over four."""
    values = torch.randn(8, r, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 4, 8)[:, None]
    values *= torch.logspace(0, -4, r)
    if code is SECOND:
        values = values.square()
    stored, scales = codes.encode(values.expand(400, -1, -1), code, range(400))
    assert stored.shape == (400, 8, r) and scales.shape == (400, 8, whole.scales_in(r))
    found = codes.decode(stored, scales, code)
    of_groups = scales[0].float().repeat_interleave(codes.GROUP, -1)[:, :r]
    # a step is at most 2^-bits of what the value is after its offset
    steps = 2.0**-code.bits * (values.abs() + 2.0**-code.octaves / code.span * of_groups)
    assert ((found - values).abs() <= 1.001 * steps).all()
    # of what never becomes zero, the smallest are larger than they are
    expected = values if code is not SECOND else values.maximum(1.001 * found.amin(0))
    assert ((found.mean(0) - expected).abs() <= 0.12 * steps).all()
    stored, scales = codes.encode(values[None], code)
    expected = values if code is not SECOND else values.maximum(found.amin(0))
    assert ((codes.decode(stored, scales, code)[0] - expected).abs() <= 0.51 * steps).all()


def test_every_code_is_a_number_of_its_own_and_comes_back():
    for code in CODES.values():
        every = (
            torch.arange(-code.last if code.dtype == torch.int8 else 0, code.last + 1).to(code.dtype).view(1, -1, 1)
        )
        numbers = codes.decode(every, torch.ones(1, every.shape[1], 1, dtype=torch.bfloat16), code)
        assert every.shape[1] >= 255 and (numbers.diff(dim=1) > 0).all() and numbers.max() == 1
        # beside a 1 that fixes the scale of the group
        both = torch.cat([numbers, torch.ones_like(numbers)], dim=2)
        for seeds in (None, [3]):
            assert torch.equal(codes.encode(both, code, seeds)[0][..., :1], every)


def test_zeros_stay_zeros_and_what_is_divided_by_does_not_become_one():
    for code in CODES.values():
        for seeds in (None, [0]):
            stored, scales = codes.encode(torch.zeros(1, 3, 40), code, seeds)
            assert not stored.any() and not codes.decode(stored, scales, code).any()
        empty = torch.zeros(1, 3, 40, dtype=code.dtype), torch.zeros(1, 3, 2, dtype=torch.bfloat16)
        assert not codes.decode(*empty, code).any()
    small = torch.tensor([1.0, 1e-30, 0.0]).view(1, 1, 3)
    for seed in range(20):
        stored, scales = codes.encode(small, SECOND, [seed])
        assert (codes.decode(stored, scales, SECOND) > 0).tolist() == [[[True, True, False]]]


def test_of_a_basis_the_residuals_norm_is_known_to_what_counts_as_negligible():
    """Where nothing is left of the gradient but what the codes round: no history for the limiter."""
    generator = torch.Generator().manual_seed(0)
    for short, r in ((128, 32), (256, 64)):
        Q = torch.linalg.qr(torch.randn(short, r, generator=generator)).Q
        Q = codes.decode(*codes.encode(Q[None], BASIS), BASIS)[0]
        for spectrum in (torch.ones(r), torch.logspace(0, -2, r), torch.eye(r)[0]):
            G = (torch.randn(90, r, generator=generator) * spectrum) @ Q.T
            R = G @ torch.linalg.pinv(Q.T)
            norms = [F.row_norms(x)[None] for x in (G, G @ Q, R)]
            phi = torch.ones_like(norms[0])
            assert F.residual_norm(phi, norms[0], norms[1], 1.0, None, codes.NEGLIGIBLE).isinf().all()


# --------------------------------------------------------------------------- steps


@pytest.mark.parametrize("shape", [(50, 34), (34, 50)])
@of_bases
def test_every_step_against_the_equations_from_the_state_that_was_kept(shape, base):
    """In fp64: codes are what the step begins with and ends in, and nothing in between is rounded."""
    p = weight(shape)
    optimizer = optimizer_of(p, base_optimizer=base, gamma=None, update_proj_gap=100, refresh="together")
    settings = {"rank": 6, "base_optimizer": base, "gamma": None, "lr": 1e-2, "adjust_lr": "match_rms_adamw"}
    for t, gradient in enumerate(gradients(shape, 8)):
        kept = optimizer.state.get(p, {})
        before = {
            name: value(kept, name).double() for name, tensor in tensors(kept).items() if not name.endswith("_scale")
        }
        W = p.detach().double()
        train(optimizer, p, [gradient])
        basis = value(optimizer.state[p], "basis")
        expected, after, _ = fira_step(W, gradient, before, basis=basis, update_proj_gap=100, **settings)
        if base != "lion" or t:  # of the first signs some are of next to nothing
            assert (p.detach().double() - expected).norm() <= 1e-3 * (expected - W).norm(), t
        for name in base_optimizers.MOMENTS[base]:
            found = value(optimizer.state[p], name)
            assert (found - after[name]).norm() <= 0.04 * after[name].norm(), name


@of_bases
@pytest.mark.parametrize("settings", [{}, {"projection": "columns"}, {"moments": "kept"}, {"residual": "none"}])
def test_it_trains_as_with_state_in_fp32(base, settings):
    if settings.get("projection") == "columns" and base != "adamw":
        pytest.skip("columns have the moments of the others and no basis")
    sequence, found = gradients((64, 48), 40), []
    for state_dtype in ("float32", "int8"):
        p = weight((64, 48))
        train(optimizer_of(p, base_optimizer=base, state_dtype=state_dtype, **settings), p, sequence)
        found.append(p.detach())
    # errors of single steps, 3% of a moment, are independent
    assert (found[1] - found[0]).norm() <= 0.05 * (found[0] - weight((64, 48)).detach()).norm()


def test_a_second_moment_follows_beta2_near_one():
    """To the nearest it could not change at all: 0.1% is a fortieth of a step."""
    p = weight((64, 48))
    optimizer = optimizer_of(p, lr=0.0, update_proj_gap=1000, refresh="together")
    gradient = gradients((64, 48), 1)[0]
    train(optimizer, p, [gradient])
    start = value(optimizer.state[p], "exp_avg_sq").double().mean()
    train(optimizer, p, [1e-6 * gradient] * 300)
    assert value(optimizer.state[p], "exp_avg_sq").double().mean() == pytest.approx(
        start.item() * 0.999**300, rel=0.03
    )


def test_the_direction_is_a_tenth_off_and_no_more():
    """V is a random walk around the exact one: sqrt(500 steps x a thousandth x a code's distance) is a fifth of V."""
    found = []
    for state_dtype in ("float32", "int8"):
        p, draws = weight((40, 24)), torch.Generator().manual_seed(0)
        optimizer = optimizer_of(p, lr=0.0, update_proj_gap=1000, refresh="together", state_dtype=state_dtype)
        train(optimizer, p, (torch.randn(40, 24, generator=draws) for _ in range(400)))
        M, V = (value(optimizer.state[p], name) for name in ("exp_avg", "exp_avg_sq"))
        found.append((M / V.sqrt(), V))
    (exact, V), (coded, of_codes) = found
    assert 0.03 < (coded - exact).norm() / exact.norm() < 0.13
    assert (of_codes.mean() / V.mean()).item() == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------- what is kept


@of_bases
def test_what_the_state_holds(base):
    """Of what is as long as the matrix, 8 bits and a scale for 32; Adafactor's vectors in bf16."""
    p = weight((96, 64))
    optimizer = optimizer_of(p, base_optimizer=base, rank=40)
    train(optimizer, p, gradients((96, 64), 2))
    state = tensors(optimizer.state[p])
    for name, tensor in state.items():
        coded = name.removesuffix("_scale") in CODES
        kind = torch.bfloat16 if name.endswith("_scale") or not coded else CODES[name].dtype
        assert tensor.dtype == (torch.float32 if name in ("step", "residual_norm") else kind), name
    held = sum(tensor.nbytes for tensor in state.values())
    of_rows = {"adamw": 2 * 96 + 64, "adafactor": 96 + 64}.get(base, 96 + 64)
    assert held == of_rows * (40 + 4) + 8 + (2 * (96 + 40) if base == "adafactor" else 0)


@pytest.mark.parametrize("rank", [16, 32, 100, 128])
def test_the_state_is_at_most_three_tenths_of_that_in_fp32(rank):
    found = []
    for state_dtype in ("int8", "float32"):
        p = nn.Parameter(torch.ones(256, 192))
        optimizer = optimizer_of(p, rank=rank, state_dtype=state_dtype, projection="random")
        train(optimizer, p, [torch.ones(256, 192)])
        found.append(sum(tensor.nbytes for tensor in tensors(optimizer.state[p]).values()))
    assert found[0] <= 0.3 * found[1]


@pytest.mark.parametrize(("bad", "device"), [(0.0, "cpu"), (math.nan, "cpu"), (1e30, "cpu"), (math.nan, "pretended")])
def test_a_bad_gradient_leaves_every_code_and_nothing_is_read_by_the_host(bad, device):
    """Of 1e30 the square is not in fp32. At calls 3 and 6 a basis is due."""
    start = weight((40, 24)).detach()
    p = Pretended(start) if device == "pretended" else nn.Parameter(start)
    optimizer = optimizer_of(p, refresh="together", update_proj_gap=3)
    sequence = gradients((40, 24), 8)
    train(optimizer, p, sequence[:1])
    for t, gradient in enumerate(sequence[1:], 1):
        before = {"weight": torch.Tensor(p.detach()).clone(), **tensors(optimizer.state[p])}
        with no_reads() if device == "pretended" else torch.enable_grad():
            train(optimizer, p, [spoiled(gradient, bad) if t in (2, 3, 6) else gradient])
        after = {"weight": torch.Tensor(p.detach()), **tensors(optimizer.state[p])}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) == (t in (2, 3, 6)), t
    assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((40, 64), {}),
        ((40, 64), {"base_optimizer": "adafactor", "moments": "kept"}),
        ((40, 64), {"split": 2, "transposed": True}),
        ((3, 20, 30), {"base_optimizer": "lion"}),
        ((40, 64), {"projection": "columns", "base_optimizer": "muon"}),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(shape, settings, dtype):
    sequence = [gradient.view(shape) for gradient in gradients((math.prod(shape[:-1]), shape[-1]), 14)]
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    assert_resumes(lambda params: optimizer_of(*params, **settings), [p], [[grad] for grad in sequence], stop=7)


def test_a_checkpoint_of_another_dtype_is_refused():
    p = weight((40, 24))
    saved, other = (optimizer_of(p, state_dtype=dtype) for dtype in ("float32", "int8"))
    for optimizer in (saved, other):
        train(optimizer, p, gradients((40, 24), 1))
    with pytest.raises(ValueError, match="state_dtype='float32'"):
        other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="state_dtype='int8'"):
        saved.load_state_dict(other.state_dict())


def test_what_is_not_projected_is_kept_in_bf16():
    bias = nn.Parameter(torch.ones(5))
    optimizer = FiraAdamW([{"params": [bias], "state_dtype": "int8"}])
    train(optimizer, bias, [torch.ones(5)])
    assert optimizer.state[bias]["exp_avg"].dtype == optimizer.state[bias]["exp_avg_sq"].dtype == torch.bfloat16


def test_four_bits_are_refused():
    with pytest.raises(ValueError, match="state_dtype='int4'.*state_dtype='int8'"):
        FiraConfig(state_dtype="int4")
