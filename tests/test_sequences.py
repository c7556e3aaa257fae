"""Random sequences of what people do between steps: each step works or is refused for a reason, and nothing crashes.

In another process, since what is tested could end it by a signal: torch's fused kernels check no shapes.
"""

import copy
import io
import math
import os
import random
import subprocess
import sys

import torch
from torch import nn

from conftest import ROOT
from fira_hf import FiraAdamW
from recipes.benchmarks.models import Pretended

SEQUENCES, LENGTH = 80, 14
SETTINGS = [
    {},
    {"base_optimizer": "lion"},
    {"base_optimizer": "adafactor"},
    {"projection": "random"},
    {"projection": "columns"},
]
SETTINGS += [
    {"state_dtype": "bfloat16", "stochastic_rounding": True},
    {"state_dtype": "int8"},
    {"refresh": "together", "moments": "kept"},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Sequence:
    """One optimizer, what is done to its weights, and what the test knows of them: whether a step can work."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = self.random.choice(SETTINGS)
        self.rounding = self.settings.get("stochastic_rounding", False)
        shapes = {
            "bias": (5,),
            "dense": (6, 8),
            "matrix": (12, 8),
            "wide": (8, 12),
            "stack": (2, 8, 6),
            "parts": (12, 8),
        }
        self.weights = {name: nn.Parameter(self.draw(shape)) for name, shape in shapes.items()}
        self.saved = None
        self.renew()

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator)

    def renew(self):
        """A new optimizer: the way out of every error."""
        for name, p in self.weights.items():
            p.grad = None
            if self.is_untrainable(p):
                self.weights[name] = nn.Parameter(self.draw(p.shape))
        w = self.weights
        of_all = {"state_dtype": self.settings.get("state_dtype", "float32"), "stochastic_rounding": self.rounding}
        projected = {"rank": 4, "update_proj_gap": 3, **self.settings}
        groups = [{"params": [(n, w[n]) for n in ("bias", "dense")], **of_all}]
        groups += [{"params": [(n, w[n]) for n in ("matrix", "wide", "stack")], **projected}]
        groups += [{"params": [("parts", w["parts"])], "split": 2, **projected}]
        self.optimizer, self.added = FiraAdamW(groups, lr=1e-2, weight_decay=0.1), 0

    def is_untrainable(self, p):
        return p.is_meta or p.dtype == torch.float64 or (self.rounding and p.dtype == torch.float16)

    def misfits(self, p):
        """Whether a step has to refuse this weight; by the shapes of its moments, not by what the optimizer asks."""
        if p.grad is None:
            return False
        state = self.optimizer.state.get(p, {})
        group = next(g for g in self.optimizer.param_groups if any(q is p for q in g["params"]))
        shape = list(p.shape)
        if "rank" in group:
            rows, columns = p.shape[-2] // group["split"], p.shape[-1]
            shape = [
                *(p.shape[:1] if p.ndim == 3 else []),
                *([2] if group["split"] == 2 else []),
                max(rows, columns),
                4,
            ]
            basis = [*shape[:-2], min(rows, columns), 4]
            if "basis" in state and list(state["basis"].shape) != basis:
                return True
        return self.is_untrainable(p) or p.grad.shape != p.shape or (state and list(state["exp_avg"].shape) != shape)

    # ------------------------------------------------------------------- what is done

    def one(self):
        return self.random.choice(list(self.weights.values()))

    def accumulate(self, bad=None):
        for p in self.weights.values():
            if not p.requires_grad or p.is_meta or (bad is None and self.random.random() < 0.2):
                continue
            gradient = self.draw(p.shape).to(p.dtype)
            if p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == p.dtype:
                p.grad += gradient
            elif p.grad is None:
                p.grad = gradient
        if bad is not None and (p := self.one()).grad is not None:
            p.grad.view(-1)[0] = bad

    def step(self, bad=None):
        self.accumulate(bad)
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        must_refuse = any(self.misfits(p) for p in weights)
        before, refusal = self.everything(), ""
        try:
            self.optimizer.step()
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
        assert bool(refusal) == must_refuse, refusal or "took what does not fit"
        if refusal:
            assert any(name in refusal for name in self.weights), refusal
            assert same(before, self.everything()), "a refused step has written"
            self.renew()
        assert all(p.is_meta or p.isfinite().all() for p in weights)
        if self.random.random() < 0.8:
            self.optimizer.zero_grad()

    def nan(self):
        self.step(self.random.choice([math.nan, math.inf]))

    def resize(self):
        p = self.one()
        if p.is_meta:
            return
        shape = list(p.shape)
        shape[-1 if p.ndim < 3 else 0] += self.random.choice([-2, -1, 3]) if p.ndim < 3 else 1
        p.data = self.draw(shape).to(p.dtype)
        if self.random.random() < 0.8:
            p.grad = None

    def cast(self):
        dtype = self.random.choices(DTYPES, [4, 4, 2, 1])[0]
        for p in self.weights.values() if self.random.random() < 0.7 else [self.one()]:
            if not p.is_meta:
                grad, p.grad = p.grad, None
                p.data = p.data.to(dtype)
                if grad is not None and grad.shape == p.shape:
                    p.grad = grad.to(dtype)

    def freeze(self):
        self.one().requires_grad_(False).grad = None

    def thaw(self):
        for p in self.weights.values():
            p.requires_grad_(True)

    def add_group(self):
        self.added += 1
        name = f"added{self.added}"
        self.weights[name] = nn.Parameter(self.draw((10, 6)))
        settings = {"rank": 4} if self.random.random() < 0.5 else {}
        settings["stochastic_rounding"] = self.rounding
        self.optimizer.add_param_group({"params": [(name, self.weights[name])], **settings})

    def rename_device(self):
        p = self.one()
        p.__class__ = nn.Parameter if type(p) is Pretended else Pretended

    def to_meta(self):
        p = self.one()
        if type(p) is nn.Parameter and self.random.random() < 0.3:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
            p.grad = torch.ones_like(p)

    def save(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        self.saved = file

    def load(self):
        if self.saved is None or any(type(p) is Pretended for p in self.weights.values()):
            return  # torch itself moves what it loads to where the weight says it is
        self.saved.seek(0)
        saved = torch.load(self.saved, weights_only=True)
        before, refused = self.everything(), False
        try:
            self.optimizer.load_state_dict(saved)
        except ValueError:
            refused = True
        assert not refused or same(before, self.everything()), "a refused load has written"

    def everything(self):
        return copy.deepcopy(([p.data for p in self.weights.values()], self.optimizer.state_dict()["state"]))

    def run(self):
        actions = [
            self.step,
            self.accumulate,
            self.nan,
            self.resize,
            self.cast,
            self.freeze,
            self.thaw,
            self.add_group,
        ]
        actions += [self.rename_device, self.to_meta, self.save, self.load]
        weights = [8, 2, 2, 1, 2, 1, 2, 1, 2, 1, 2, 2]
        done = []
        for action in self.random.choices(actions, weights, k=LENGTH):
            done.append(action.__name__)
            try:
                action()
            except Exception as error:
                raise AssertionError(f"{done}, with {self.settings}: {type(error).__name__}: {error}") from error
        self.step()


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if torch.is_tensor(one):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and (one.is_meta or torch.equal(one, other))
    return one == other


def test_nothing_that_people_do_crashes():
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"ended by {result.returncode}: {result.stderr[-3000:]}"
    assert result.stdout == f"{SEQUENCES} sequences, all as expected\n"


def main():
    torch.set_num_threads(1)
    failures = []
    for seed in range(SEQUENCES):
        try:
            Sequence(seed).run()
        except AssertionError as error:
            failures.append(f"seed {seed}: {error}")
    if failures:
        sys.exit("\n".join([*failures[:5], f"{len(failures)} of {SEQUENCES} sequences failed"]))
    print(f"{SEQUENCES} sequences, all as expected")


if __name__ == "__main__":
    main()
