"""Finding a basis: what any method must give, and how near the power iteration comes to the exact basis."""

import pytest
import torch

from fira_hf import subspace
from fira_hf.subspace import find_bases

METHODS = ("svd", "power", "random", "sketch")
SHAPES = [(90, 70), (70, 90), (80, 80), (200, 12), (12, 200)]  # 12 is short enough for the exact basis of "power"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling(shape, decay, seed=0):
    """A matrix with singular values 1, 2^-decay, 3^-decay, ..."""
    short = min(shape)
    left, right = (torch.linalg.qr(noise(side, short, seed=seed + i)).Q for i, side in enumerate(shape))
    return (left * torch.arange(1, short + 1.0) ** -decay) @ right.T


GRADIENTS = {
    "noise": lambda shape: noise(*shape),
    "falling": lambda shape: falling(shape, 2.0),
    "rank 3": lambda shape: noise(shape[0], 3) @ noise(3, shape[1], seed=1),
    "one entry": lambda shape: torch.zeros(shape).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "one row": lambda shape: torch.zeros(shape).index_fill(0, torch.tensor(2), 1.0),
    "equal": lambda shape: torch.ones(shape),
    "huge": lambda shape: 1e16 * noise(*shape),
    "tiny": lambda shape: 1e-30 * noise(*shape),
    "bf16": lambda shape: noise(*shape).bfloat16(),
    "fp16": lambda shape: noise(*shape).half(),
}


def orthogonality_error(Q):
    return (Q.double().T @ Q.double() - torch.eye(Q.shape[1], dtype=torch.float64)).abs().max()


def energy(grad, Q):
    """||G Q||^2 beside that of the exact basis of the same rank."""
    G = grad.double() if grad.shape[0] >= grad.shape[1] else grad.double().T
    return ((G @ Q.double()).square().sum() / torch.linalg.svdvals(G)[: Q.shape[1]].square().sum()).item()


@pytest.mark.parametrize("rank", [1, 5, 12, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_basis_is_orthonormal_whatever_the_gradient(method, kind, shape, rank):
    grads = [GRADIENTS[kind](shape), GRADIENTS[kind](shape)]
    bases = [None, None]
    for seed in range(3):
        bases = find_bases(grads, rank, method, bases, [seed, seed + 10])
        for Q in bases:
            assert Q.shape == (min(shape), min(rank, min(shape)))
            assert Q.dtype == torch.float32 and Q.T.is_contiguous()
            # a fraction of the limit in the code; the closed form of the residual's norm is good to about this
            assert orthogonality_error(Q) <= 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_and_short_power_capture_the_most_that_can_be(shape):
    grad = noise(*shape)
    for method in ("svd", "power") if min(shape) <= subspace.EXACT else ("svd",):
        (Q,) = find_bases([grad], 5, method, [None], [0])
        assert energy(grad, Q) == pytest.approx(1, abs=1e-5)


def test_power_iterations_close_in_on_the_exact_basis():
    """By the ratio of the squared singular values at each iteration: the more iterations, the more energy."""
    grad = falling((300, 200), 1.0)
    Q, captured = None, []
    for seed in range(12):
        (Q,) = find_bases([grad], 10, "power", [Q], [seed])
        captured.append(energy(grad, Q))
    assert captured[0] > 0.97  # two iterations from a sketch
    assert all(later >= earlier - 1e-6 for earlier, later in zip(captured, captured[1:], strict=False))
    assert captured[-1] > 0.9999
    (random,) = find_bases([grad], 10, "random", [None], [0])
    assert energy(grad, random) < 0.2


def test_columns_of_a_warm_basis_come_in_falling_order():
    grad = falling((300, 200), 1.0)
    Q = None
    for seed in range(30):
        (Q,) = find_bases([grad], 6, "power", [Q], [seed])
    norms = torch.linalg.vector_norm(grad @ Q, dim=0)
    assert torch.allclose(norms, 1 / torch.arange(1, 7.0), rtol=1e-3)


@pytest.mark.parametrize("method", ["power", "random", "sketch"])
def test_seeds_decide_and_the_global_generator_does_not(method):
    grad = noise(90, 70)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (one,) = find_bases([grad], 5, method, [None], [7])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    (same,) = find_bases([grad], 5, method, [None], [7])
    (other,) = find_bases([grad], 5, method, [None], [8])
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_batch_gives_what_each_gradient_gives_alone():
    grads = [noise(90, 70, seed=seed) for seed in range(3)]
    starts = [None, *find_bases(grads[1:], 5, "power", [None, None], [4, 5])]
    together = find_bases(grads, 5, "power", starts, [1, 2, 3])
    for grad, start, seed, Q in zip(grads, starts, [1, 2, 3], together, strict=True):
        (alone,) = find_bases([grad], 5, "power", [start], [seed])
        assert (alone - Q).abs().max() <= 1e-5


def test_svd_that_does_not_converge_is_repeated_in_double(monkeypatch):
    svd = torch.linalg.svd

    def stubborn(matrix, **settings):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    (Q,) = find_bases([noise(30, 20)], 5, "svd", [None], [0])
    assert orthogonality_error(Q) <= 1e-6

    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    assert find_bases([noise(30, 20)], 5, "svd", [None], [0]) == [None]


def test_cholesky_that_fails_falls_back_to_householder(monkeypatch):
    """Also where only one of a batch needs it."""
    fine, bad = falling((300, 200), 0.5), noise(300, 2) @ noise(2, 200, seed=1)
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: calls.append(matrix.shape) or qr(matrix))
    starts = [torch.eye(200)[:, :10].contiguous()] * 2
    for Q in find_bases([fine, bad], 10, "power", starts, [0, 1]):
        assert orthogonality_error(Q) <= 1e-5
    assert calls == [(200, 10)]
