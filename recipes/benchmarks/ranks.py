"""Does a rank for each matrix, chosen at its refreshes, train better than one rank for all in the same bytes?

    python -m recipes.benchmarks.ranks --output docs/benchmarks/adaptive-rank.json [--data DIR] [--rows equal,...]
        trains the smallest model of the quality benchmark once a row and seed; what the file has is not run again

A prototype: a matrix at its refresh looks at all singular values of its gradient, so a rank is chosen from the exact
energies. State shrinks and grows by rotation: nothing is lost of what both bases share.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from fira_hf import FiraAdamW, base_optimizers, views
from fira_hf import functional as F
from fira_hf.subspace import leading_eigenvectors
from recipes import files, measure
from recipes.benchmarks.optimizers import QUALITY
from recipes.benchmarks.quality import train as quality
from recipes.benchmarks.quality.train import Data, Regime, load, validate
from recipes.pretraining.settings import EMBEDDED

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
KINDS = ATTENTION + MLP  # the matrices of a layer, in the model's order
SHOWN = (1, 2, 4, 8, 16, 32, 64)  # the ranks of which the energy is recorded
RECORDED = (1, 10, 50, 100)  # the steps after which ranks and energies are recorded
DEFAULT = {"alpha": 1.0, "gamma": 2.0, "adjust_lr": "match_rms_adamw"}
DEFAULT_ROW = {"choose": "fixed", "least": 4, "most": 64, "every": 4, "together": False, "steps_alone": False}

console = Console()


class AdaptiveFira(FiraAdamW):
    """`FiraAdamW` with one matrix a group, whose rank may change at a refresh.

    rank: of all at the start, and the mean of all (weighted by bytes) where a budget is shared.
    choose: "fixed"; "equal", so that the directions of all matrices have the same share of ||G||^2, in the bytes that
        `rank` takes; or a rank for each of `KINDS`.
    least, most, every: a rank is one of least, least + every, ..., most.
    together: steps are scaled as if all ranks were `rank`.
    steps_alone: all have that rank; of those that were chosen only the steps follow, by sqrt(chosen / rank).
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        rank: int,
        gap: int,
        choose: Any = "fixed",
        least: int = 4,
        most: int = 64,
        every: int = 4,
        together: bool = False,
        steps_alone: bool = False,
        **settings: Any,
    ) -> None:
        self.choose, self.mean_rank = choose, rank
        self.levels = list(range(least, min(most, *params[0].shape) + 1, every))
        self.matrices, self.steps_alone = list(params), steps_alone
        self.factors = [1.0] * len(self.matrices)  # of the learning rate, with `steps_alone`
        if together:
            settings["adjust_lr"] = "none"
            lr *= base_optimizers.rms_scale("adamw", 0, min(params[0].shape), rank)
        own = [rank] * len(self.matrices)
        if isinstance(choose, dict):
            own = [choose[KINDS[i % len(KINDS)]] for i in range(len(self.matrices))]
        groups = [{"params": [p], "rank": r, "update_proj_gap": gap} for p, r in zip(self.matrices, own, strict=True)]
        super().__init__([group | settings for group in groups], lr=lr)
        self.shares: Tensor | None = None  # (matrices, levels): of the gradient's energy, at each one's last refresh

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.choose == "equal":
            if self.shares is None:
                self.shares = torch.stack([self.shares_of(p, self.levels) for p in self.matrices])
            due = [i for i, p in enumerate(self.matrices) if p in self.state and self.state[p].refresh_in == 0]
            for i in due:
                self.shares[i] = self.shares_of(self.matrices[i], self.levels)
            if due:
                chosen = self._chosen()
                for i in due:
                    if self.steps_alone:
                        self.factors[i] = math.sqrt(chosen[i] / self.mean_rank)
                    else:
                        self._resize(self.matrices[i], self.param_groups[i], chosen[i])
        rates = [group["lr"] for group in self.param_groups]
        for group, factor in zip(self.param_groups, self.factors, strict=True):
            group["lr"] *= factor
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

    @staticmethod
    def shares_of(p: nn.Parameter, ranks: Sequence[int]) -> Tensor:
        """Of ||G||^2 in the leading directions, for each rank."""
        G = views.tall(p.grad).double()
        energies = torch.linalg.eigvalsh(G.T @ G).flip(0).clamp(min=0)
        return (energies.cumsum(0) / energies.sum())[torch.tensor(ranks).clamp(max=len(energies)) - 1]

    def _chosen(self) -> list[int]:
        """The rank that each matrix should have now."""
        shares, last = self.shares, len(self.levels) - 1
        cost = [sum(p.shape) + max(p.shape) for p in self.matrices]  # of a rank more
        left = sum(cost) * self.mean_rank - sum(cost) * self.levels[0]
        places, open_ones = [0] * len(cost), set(range(len(cost)))
        while open_ones:
            i = min(open_ones, key=lambda i: shares[i, places[i]].item())
            price = cost[i] * (self.levels[places[i] + 1] - self.levels[places[i]])
            if price > left:
                open_ones.discard(i)
                continue
            left, places[i] = left - price, places[i] + 1
            if places[i] == last:
                open_ones.discard(i)
        return [self.levels[place] for place in places]

    def _resize(self, p: nn.Parameter, group: dict[str, Any], rank: int) -> None:
        state, G = self.state[p], views.tall(p.grad)
        Q = state["basis"]
        r = Q.shape[1]
        if rank == r:
            return
        P = G @ Q
        if rank < r:
            new = Q @ leading_eigenvectors(P.T @ P, rank)
        else:
            rest = G - P @ Q.T
            E = leading_eigenvectors(rest.T @ rest, rank - r)
            new = torch.cat([Q, torch.linalg.qr(E - Q @ (Q.T @ E)).Q], dim=1)
        C = Q.T @ new
        b1, b2 = (F.bias_correction(beta, state["step"]) for beta in group["betas"])
        ratio, M, V = b2 / b1.square(), state["exp_avg"], state["exp_avg_sq"]
        variance = (V - ratio * M.square()).clamp(min=0) @ C.square()
        M = M @ C
        state["exp_avg"], state["exp_avg_sq"] = M, variance + ratio * M.square()
        state["basis"] = F.column_major(new)
        group["rank"] = rank
        state.belongs_to(group)


QUALITY["adaptive"] = lambda matrices, lr, rank, gap, settings: AdaptiveFira(matrices, lr, rank, gap, **settings)

# The ranks that "equal" has between steps 50 and 100, as means of the layers.
BY_KIND = {"q": 14, "k": 12, "v": 8, "o": 8, "gate": 21, "up": 21, "down": 16}
# name -> the rank of all, and the settings of `AdaptiveFira`.
ROWS: dict[str, dict[str, Any]] = {
    "equal": {"rank": 16, "choose": "equal"},
    "equal-one-scale": {"rank": 16, "choose": "equal", "together": True},
    "fixed": {"rank": 16},
    "equal-steps-alone": {"rank": 16, "choose": "equal", "steps_alone": True},
    "kinds-one-scale": {"rank": 16, "choose": BY_KIND, "together": True},
}


class Stopped(Exception):
    """A run has gone as far as it should."""


def run(
    row: dict[str, Any],
    lr: float,
    regime: Regime,
    seed: int,
    data: Data,
    stop: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """`keep` is given the figures so far at each evaluation; the run ends at the first one after `stop` steps."""
    settings = DEFAULT | {key: value for key, value in row.items() if key != "rank"}
    method = {"optimizer": "adaptive", "rank": row["rank"], "interval": 10, "settings": settings}
    sizes: list[int] = []
    history: list[float] = []
    seen: dict[str, dict[str, Any]] = {"ranks": {}, "shares": {}}
    start = time.perf_counter()

    def watch(step: int, optimizer: AdaptiveFira, matrices: list[nn.Parameter]) -> None:
        sizes.append(measure.state_bytes(optimizer))
        if step + 1 in RECORDED:
            seen["ranks"][str(step + 1)] = [group["rank"] for group in optimizer.param_groups]
            shares = [optimizer.shares_of(p, SHOWN).tolist() for p in matrices]
            seen["shares"][str(step + 1)] = [[round(share, 4) for share in of] for of in shares]

    def validated(model: nn.Module, valid: Tensor) -> float:
        history.append(round(validate(model, valid), 4))
        found = {"steps": len(sizes), "history": history, "mean_bytes": round(statistics.mean(sizes))}
        found |= {"peak_bytes": max(sizes), **seen, "seconds": round(time.perf_counter() - start)}
        console.print(history, f"bytes: {found['mean_bytes']:,} on average, {found['peak_bytes']:,} at most")
        keep(found)
        if len(sizes) >= stop:
            raise Stopped
        return history[-1]

    with (
        tqdm(total=stop, disable=None, leave=False) as bar,
        mock.patch.object(quality, "validate", validated),
        contextlib.suppress(Stopped),
    ):
        quality.train(method, lr, regime, seed, data, watch, lambda step, loss: bar.update())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument(
        "--data", default=EMBEDDED, help="folder with train.txt and valid.txt; default: Python's manual"
    )
    parser.add_argument("--size", default="1m", help="tiny, 1m, 3m or 10m")
    parser.add_argument("--batch", type=int, default=4096, help="bytes of a step")
    parser.add_argument("--steps", type=int, default=400, help="of the schedule")
    parser.add_argument("--stop", type=int, help="end a run after so many of them")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(words)
    regime, data, stop = Regime(options.size, options.batch, options.steps), load(options.data), options.stop
    stop = stop or options.steps
    command = ["python", "-m", "recipes.benchmarks.ranks", *(sys.argv[1:] if words is None else words)]
    measure.commit()
    for name in options.rows.split(","):
        for seed in map(int, options.seeds.split(",")):
            about = {"name": name, **DEFAULT_ROW, **ROWS[name], "text": data.digest, "regime": str(regime)}
            about |= {"lr": options.lr, "seed": seed}

            def others(about: dict[str, Any] = about) -> list[dict[str, Any]]:
                runs = (files.read_json(options.output) or {"runs": []})["runs"]
                return [run for run in runs if not (about.items() <= run.items() and run["steps"] < stop)]

            def keep(found: dict[str, Any], about: dict[str, Any] = about) -> None:
                whole = about | found | {"provenance": measure.provenance(about["seed"], command)}
                files.write_json(options.output, {"runs": [*others(about), whole]})

            if not any(about.items() <= run.items() for run in others()):
                console.print(f"{name}, seed {seed}")
                run(ROWS[name], options.lr, regime, seed, data, stop, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
