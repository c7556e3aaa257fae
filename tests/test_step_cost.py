"""What one ordinary step allocates."""

import pytest
import torch

from fira_hf import FiraAdamW
from fira_hf import matrices as matrices_module
from recipes.benchmarks.memory import allocations, peak
from reference import weight

SHAPES = [(128, 128), (344, 128), (128, 344)]  # LLaMA-60M's matrices, each side a quarter
RANK = 32


def test_the_meter_sees_what_a_naive_step_allocates():
    W, G, Q = torch.zeros(344, 128), torch.ones(344, 128), torch.ones(128, 32)
    allocations(lambda: W.sub_(G - (G @ Q) @ Q.T))  # warm: lazily made buffers are not the step's
    sizes = allocations(lambda: W.sub_(G - (G @ Q) @ Q.T))
    full = 4 * 344 * 128
    assert max(sizes) == full
    assert peak(sizes) == 2 * full
    assert sum(sizes) == 0


@pytest.mark.parametrize("track_statistics", [False, True])
@pytest.mark.parametrize("shapes", [[s] for s in SHAPES] + [SHAPES * 2], ids=str)
def test_no_tensor_of_the_weights_size(shapes, track_statistics, monkeypatch):
    """Beyond the state: four low-rank gradients (long x rank), whatever the number of matrices."""
    monkeypatch.setitem(matrices_module.BATCH, "cpu", RANK * 128)  # a batch is one matrix
    parameters = [weight(s, seed=i) for i, s in enumerate(shapes)]
    optimizer = FiraAdamW(
        [{"params": parameters, "rank": RANK, "alpha": 0.25, "update_proj_gap": 100}], lr=1e-3, weight_decay=0.1
    )
    optimizer.track_statistics = track_statistics
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()  # the state
    optimizer.step()  # warm: lazily made buffers are not the step's
    sizes = allocations(optimizer.step)

    low_rank = 4 * RANK * max(max(s) for s in shapes)
    assert sizes
    assert max(sizes) < min(4 * p.numel() for p in parameters)
    assert max(sizes) <= low_rank
    assert peak(sizes) <= 4 * low_rank


def test_small_matrices_go_together_up_to_a_limit(monkeypatch):
    """Of 12 matrices, batches of 5, 5 and 2: four low-rank gradients of a batch, at most."""
    monkeypatch.setitem(matrices_module.BATCH, "cpu", 5 * 16 * 64)
    parameters = [weight((64, 32), seed=i) for i in range(12)]
    optimizer = FiraAdamW([{"params": parameters, "rank": 16, "update_proj_gap": 100, "refresh": "together"}], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.step()
    sizes = allocations(optimizer.step)
    assert max(sizes) == 4 * 5 * 16 * 64
    assert peak(sizes) <= 4 * max(sizes)
