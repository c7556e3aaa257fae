"""The prototype of a rank for each matrix: what a change of rank keeps, and which ranks are chosen."""

import json

import pytest
import torch

from fira_hf import FiraAdamW
from recipes.benchmarks import ranks
from recipes.benchmarks.ranks import DEFAULT, AdaptiveFira


def gradients(shapes, seed, decays):
    """Matrices whose singular values fall by a factor from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    for (rows, columns), decay in zip(shapes, decays, strict=True):
        short = min(rows, columns)
        left, right = (
            torch.linalg.qr(torch.randn(n, short, generator=generator)).Q for n in (max(rows, columns), short)
        )
        G = left @ torch.diag(decay ** torch.arange(short)) @ right.T
        yield G if rows >= columns else G.T


def trained(optimizer, parameters, steps, decays):
    for step in range(steps):
        for p, G in zip(parameters, gradients([p.shape for p in parameters], step, decays), strict=True):
            p.grad = G
        optimizer.step()
    return parameters


def test_with_one_rank_for_all_it_is_the_optimizer():
    both = [[torch.nn.Parameter(torch.zeros(shape)) for shape in ((48, 32), (32, 40))] for _ in range(2)]
    own = trained(AdaptiveFira(both[0], 1e-3, 8, 3, **DEFAULT), both[0], 7, (0.9, 0.5))
    group = {"params": both[1], "rank": 8, "update_proj_gap": 3, **DEFAULT}
    for p, expected in zip(own, trained(FiraAdamW([group], lr=1e-3), both[1], 7, (0.9, 0.5)), strict=True):
        assert p.any() and torch.allclose(p, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rank", [4, 12])
def test_a_change_of_rank_keeps_what_both_bases_share(rank):
    p = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = AdaptiveFira([p], 1e-3, 8, 100, **DEFAULT)
    trained(optimizer, [p], 5, (0.9,))
    state = optimizer.state[p]
    Q, M, V = (state[name].clone() for name in ("basis", "exp_avg", "exp_avg_sq"))
    optimizer._resize(p, optimizer.param_groups[0], rank)
    new, shared = state["basis"], state["exp_avg"] @ state["basis"].T
    assert new.shape == (32, rank) and torch.allclose(new.T @ new, torch.eye(rank), atol=1e-5)
    if rank > 8:
        assert torch.allclose(shared, M @ Q.T, atol=1e-6)
        assert torch.allclose(state["exp_avg_sq"][:, :8], V, rtol=1e-3, atol=1e-9)
        # What is new is what the gradient has most of outside the old basis.
        rest = p.grad - p.grad @ Q @ Q.T
        best = torch.linalg.svdvals(rest)[: rank - 8].norm()
        assert torch.allclose((p.grad @ new[:, 8:]).norm(), best, rtol=1e-4)
    else:
        best = torch.linalg.svdvals(p.grad @ Q)[:rank].norm()
        assert torch.allclose((p.grad @ new).norm(), best, rtol=1e-4)
        assert torch.allclose(shared, M @ Q.T @ new @ new.T, atol=1e-6)
    p.grad = p.grad + 0.1
    optimizer.step()
    assert state["exp_avg_sq"].shape == (48, rank) and p.isfinite().all()


def test_the_same_share_for_all_in_the_bytes_of_one_rank():
    """A matrix whose values fall slowly needs more directions than one whose values fall fast."""
    shapes, decays = [(48, 32), (32, 48), (48, 32)], (0.97, 0.5, 0.8)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdaptiveFira(parameters, 1e-3, 12, 3, choose="equal", least=4, most=24, **DEFAULT)
    trained(optimizer, parameters, 10, decays)
    found = [optimizer.state[p]["basis"].shape[1] for p in parameters]
    assert found == [group["rank"] for group in optimizer.param_groups] == [24, 4, 8]


def test_steps_alone_follow_the_ranks_that_would_be_chosen():
    """At one gradient, a matrix's step is sqrt(rank / mean rank) of what it is with a fixed rank."""
    both = [[torch.nn.Parameter(torch.zeros(48, 32)) for _ in range(2)] for _ in range(2)]
    settings = {"choose": "equal", "least": 4, "most": 24, "steps_alone": True, **DEFAULT}
    optimizers = [AdaptiveFira(both[0], 1e-3, 8, 3, **settings), AdaptiveFira(both[1], 1e-3, 8, 3, **DEFAULT)]
    for parameters, optimizer in zip(both, optimizers, strict=True):
        trained(optimizer, parameters, 8, (0.97, 0.5))
    before = [[p.detach().clone() for p in parameters] for parameters in both]
    for parameters, optimizer in zip(both, optimizers, strict=True):
        trained(optimizer, parameters, 1, (0.97, 0.5))
        assert [group["rank"] for group in optimizer.param_groups] == [8, 8]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    for place, rank in enumerate((12, 4)):
        own, fixed = ((both[i][place] - before[i][place]).norm().item() for i in range(2))
        assert own / fixed == pytest.approx((rank / 8) ** 0.5, rel=1e-4)


def test_a_run_is_kept_at_each_evaluation_and_not_run_again(tmp_path, capsys):
    path = tmp_path / "ranks.json"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("All happy families are alike. " * 20)
    words = ["--size", "tiny", "--batch", "256", "--steps", "8", "--rows", "equal", "--data", str(tmp_path)]
    words += ["--output", str(path)]
    assert ranks.main([*words, "--stop", "2"]) == 0
    (short,) = json.loads(path.read_text())["runs"]
    assert ranks.main([*words, "--stop", "3"]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["steps"] == 3 and len(run["history"]) == 3 and run["history"][:2] == short["history"]
    assert len(run["ranks"]["1"]) == 7 and run["mean_bytes"] <= run["peak_bytes"]
    capsys.readouterr()
    assert ranks.main([*words, "--stop", "2"]) == 0 and not capsys.readouterr().out
