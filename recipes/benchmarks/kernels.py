"""Whether the kernels of an accelerator compute what they should: each against fp64, beside the torch code.

Every function is called on three matrices of a shape, the second of which is not active and has a gradient of NaN and
infinities. What it returns or writes is judged element by element: an error may be as large as the rounding to the
dtype of the output, and as that of a product, which is `PRODUCT` or `OF_UPDATE` times what the absolute values of its
factors give.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fira_hf import functional, whole
from recipes import errors

# A product may err by a sixteenth of what one rounding to a 16-bit dtype does; one of fp32 by 64 roundings.
PRODUCT = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: 2.0**-18}
# The update of a bf16 weight is one product of factors that are rounded to bf16, by up to 2^-8 each, as the gradient
# that they come from has been.
OF_UPDATE = PRODUCT | {torch.bfloat16: 2.0**-7 + 2.0**-12}
FP32 = 2.0**-20  # of what is computed in fp32, element by element
NORM = 2.0**-18  # of a norm, relative
BETAS, EPS = (0.9, 0.999), 1e-6
COUNT, OFF = 3, 1  # matrices of a call, and which is not active
STANDARD_ERRORS = 5  # by which a mean may be off: one of a million is further
LAYOUTS = ("tall", "wide", "strided", "stack", "fused")


@dataclass(frozen=True)
class Case:
    """One shape (long, short) of matrices: the dtypes of weights and of the state, and how they lie in memory."""

    dtype: torch.dtype
    shape: tuple[int, int]
    rank: int
    layout: str
    state: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = (f"{str(self.dtype)[6:]} {self.shape[0]}x{self.shape[1]}", f"rank {self.rank}", self.layout)
        return ", ".join(words + (() if self.state == torch.float32 else (f"state {str(self.state)[6:]}",)))


DTYPES = (torch.bfloat16, torch.float32, torch.float16)
STATES = (torch.float32, torch.bfloat16)
FULL: tuple[tuple[Any, ...], ...] = (
    DTYPES,
    ((4096, 1024), (2731, 1019), (1000, 1000)),
    (128, 1, 48, 127, 512),
    LAYOUTS,
    STATES,
)
TINY: tuple[tuple[Any, ...], ...] = (DTYPES, ((53, 19), (32, 32)), (16, 1, 7), LAYOUTS[:3], STATES)


def cases(axes: tuple[tuple[Any, ...], ...]) -> Iterator[Case]:
    """Few cases in which any two values of two axes meet; those that meet most come first."""
    left = [(frozenset(itertools.combinations(enumerate(one), 2)), one) for one in itertools.product(*axes)]
    seen: set[Any] = set()
    while True:
        pairs, one = max(left, key=lambda item: len(item[0] - seen))
        if pairs <= seen:
            return
        seen |= pairs
        yield Case(*one)


class Inputs:
    """The tensors of one case, the same each time that they are made."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.active = torch.tensor([i != OFF for i in range(COUNT)], device=device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def matrices(self, scale: float) -> list[Tensor]:
        """As tall views; strided, every second column of larger ones."""
        (long, short), layout = self.case.shape, self.case.layout

        def make(*shape: int) -> Tensor:
            return (scale * self.random(*shape)).to(self.case.dtype)

        if layout == "wide":
            return [make(short, long).t() for _ in range(COUNT)]
        if layout == "strided":
            return [make(long, 2 * short)[:, ::2] for _ in range(COUNT)]
        if layout == "stack":
            return list(make(COUNT, long, short).unbind())
        if layout == "fused":
            return [part.t() for part in make(COUNT * short, long).chunk(COUNT)]
        return [make(long, short) for _ in range(COUNT)]

    def gradients(self) -> list[Tensor]:
        grads = self.matrices(0.02)
        grads[OFF].fill_(torch.nan)[::2] = torch.inf
        return grads

    def bases(self) -> list[Tensor]:
        short, rank = self.case.shape[1], self.case.rank
        return [
            functional.column_major(torch.linalg.qr(self.random(short, rank)).Q).to(self.case.state) for _ in "123"
        ]

    def ranges(self) -> list[Any]:
        """Of neighbouring columns, the first and the last of which lie partly outside, as in a sharded weight."""
        short, rank = self.case.shape[1], self.case.rank
        return [range(first, first + rank) for first in (-(rank // 2), 0, short - (rank + 1) // 2)]

    def moments(self, is_packed: bool) -> list[whole.Whole]:
        """Of the weights' size, as they are kept beside such weights: of the state's dtype, or in codes of 8 bits for
        fp32 and 4 for bf16. Strided, parts of something wider."""
        (long, short), layout = self.case.shape, self.case.layout
        is_turned = layout in ("wide", "fused")
        rows, columns = (short, long) if is_turned else (long, short)
        values = 0.02 * self.random(COUNT, rows, columns)
        bits = 8 if self.case.state == torch.float32 else 4
        kept = whole.encode(values, bits) if is_packed else (values.to(self.case.state),)
        if layout == "strided":
            kept = tuple(torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in kept)
        each = zip(*kept, strict=True)
        return [whole.Whole(of[0], of[1] if is_packed else None, columns, is_turned) for of in each]

    def low_rank(self, rows: int) -> Tensor:
        return self.random(COUNT, rows, self.case.rank)


class Errors:
    """By what outputs are off: `error` relative to the norm, and `worst` relative to what each element may be off."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: Tensor, exact: Tensor, allowed: Tensor) -> None:
        if value.shape != exact.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(exact.shape)}")
        off = (value.double() - exact).abs()
        tiny = torch.finfo(value.dtype).tiny * torch.finfo(value.dtype).eps
        whole = exact.norm().clamp(min=1e-300)
        self.put(name, (off.norm() / whole).item(), (off / (allowed + tiny)).max().item())

    def put(self, name: str, error: float, worst: float) -> None:
        old = self.found.get(name, {"error": 0.0, "worst": 0.0})
        # a NaN is larger than anything
        new = {"error": error, "worst": worst}
        self.found[name] = {key: max(old[key], new[key] if new[key] == new[key] else torch.inf) for key in old}

    def same(self, name: str, value: Tensor, before: Tensor) -> None:
        """What must not have changed, to the last bit."""
        is_same = torch.equal(value, before)
        self.put(name, 0.0 if is_same else torch.inf, 0.0 if is_same else torch.inf)


def roundoff(dtype: torch.dtype, at_random: bool = False) -> float:
    """The relative error of one rounding; at random to either neighbour it is twice as large."""
    return torch.finfo(dtype).eps * (1.0 if at_random else 0.5)


def as_matrix(Q: Any, short: int, device: str) -> Tensor:
    """The basis in fp64; of a range of columns, what picks them."""
    if isinstance(Q, Tensor):
        return Q.double()
    place = torch.arange(short, device=device).view(-1, 1)
    return (place == torch.arange(Q.start, Q.stop, device=device)).double()


def on() -> list[int]:
    return [i for i in range(COUNT) if i != OFF]


def check_project(of_ranges: bool, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    grads, bases = inputs.gradients(), inputs.ranges() if of_ranges else inputs.bases()
    R, norms = ops.project(grads, bases)
    for i in on():
        G, Q = grads[i].double(), as_matrix(bases[i], case.shape[1], device)
        found.add("R", R[i], G @ Q, PRODUCT[case.dtype] * (G.abs() @ Q.abs()))
        exact = G.norm(dim=1, keepdim=True)
        found.add("row norms", norms[i], exact, NORM * exact)
    return found


def check_transposed_products(ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    grads, P = inputs.gradients(), inputs.low_rank(case.shape[0])
    products = ops.transposed_products(grads, P)
    for i in on():
        G = grads[i].double()
        found.add("G^T P", products[i], G.T @ P[i].double(), PRODUCT[case.dtype] * (G.abs().T @ P[i].double().abs()))
    return found


def check_direction(base: str, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    R = 0.1 * inputs.low_rank(case.shape[0])
    R[OFF] = torch.nan
    M = (0.1 * inputs.low_rank(case.shape[0])).to(case.state)
    V = (0.01 + inputs.low_rank(case.shape[0]).square() * 0.01).to(case.state)
    at_random = case.state != torch.float32
    stored = [[x.clone() for x in of] for of in ((M, V) if base == "adamw" else (M,))]
    seeds = [[10 * k + i for i in range(COUNT)] for k in range(len(stored))] if at_random else None
    N, R_norms, N_norms = ops.direction(base, R, stored, BETAS, EPS, inputs.active, seeds)
    u, (b1, b2) = roundoff(case.state, at_random), BETAS
    for i in on():
        r, m, v = R[i].double(), M[i].double(), V[i].double()
        parts = b1 * m.abs() + (1 - b1) * r.abs()
        mixed = b1 * m + (1 - b1) * r
        if base == "lion":
            exact, allowed = mixed.sign(), 2.0 * (mixed.abs() <= FP32 * parts)  # its sign is not known
            mixed, parts = b2 * m + (1 - b2) * r, b2 * m.abs() + (1 - b2) * r.abs()
        else:
            v = b2 * v + (1 - b2) * r.square()
            found.add("V", stored[1][i], v, (u + FP32) * v)
            roots = v.sqrt() + EPS
            exact, allowed = mixed / roots, 4 * FP32 * parts / roots
        found.add("M", stored[0][i], mixed, u * mixed.abs() + FP32 * parts)
        found.add("N", N[i], exact, allowed)
        for name, norms, of, off in (("R", R_norms, r, 0 * r), ("N", N_norms, exact, allowed)):
            whole = of.norm(dim=1, keepdim=True)
            found.add(f"row norms of {name}", norms[i], whole, NORM * whole + off.norm(dim=1, keepdim=True))
    for old, new in zip((M, V), stored, strict=False):
        found.same("not active", new[OFF], old[OFF])
    found.same("not active", N[OFF], torch.zeros_like(N[OFF]))
    return found


def check_apply_updates(has_R: bool, has_B: bool, of_ranges: bool, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    weights, grads = inputs.matrices(0.02), inputs.gradients()
    bases = inputs.ranges() if of_ranges else inputs.bases()
    before = [W.clone() for W in weights]
    N, R = inputs.low_rank(case.shape[0]), 0.1 * inputs.low_rank(case.shape[0]) if has_R else None
    a = 0.01 * torch.arange(1.0, COUNT + 1, device=device).view(COUNT, 1, 1)
    B, k, decay = inputs.random(COUNT, case.shape[0], 1).abs(), 0.25, 0.99 if has_B else 1.0
    B[OFF] = torch.nan
    at_random = has_R and case.dtype == torch.bfloat16
    seeds = list(range(COUNT)) if at_random else None
    u, p = roundoff(case.dtype, at_random), OF_UPDATE[case.dtype]
    ops.apply_updates(weights, grads, N.clone(), R, a, k, B if has_B else None, bases, decay, inputs.active, seeds)
    B = B if has_B else torch.zeros_like(B)
    for i in on():
        W, G, b = before[i].double(), grads[i].double(), B[i].double()
        Q = as_matrix(bases[i], case.shape[1], device)
        A, parts = a[i].double() * N[i].double(), (a[i] * N[i]).double().abs()
        if R is not None:
            A, parts = A - k * b * R[i].double(), parts + k * b * R[i].double().abs()
        exact = decay * (W - A @ Q.T - b * G)
        movement = parts @ Q.T.abs() + b * G.abs()
        found.add("W", weights[i], exact, u * exact.abs() + p * movement + FP32 * W.abs())
    found.same("not active", weights[OFF], before[OFF])
    return found


def of_moments(ops: Any) -> tuple[Any, Any]:
    """What reads and what writes whole moments: kernels, or the torch code."""
    is_torch = ops is functional
    return (whole.project, whole.apply_updates) if is_torch else (ops.project_moments, ops.apply_moment_updates)


def mixed(G: Tensor, M: Tensor, beta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """beta M + (1 - beta) G in fp64, and what it may be off where it is rounded to a dtype."""
    parts = beta * M.abs() + (1 - beta) * G.double().abs()
    exact = beta * M + (1 - beta) * G.double()
    return exact, FP32 * parts + (0 if dtype == torch.float32 else roundoff(torch.bfloat16)) * exact.abs()


def check_project_moments(is_packed: bool, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    grads, bases, moments = inputs.gradients(), inputs.bases(), inputs.moments(is_packed)
    Z, norms = of_moments(ops)[0](grads, moments, bases, BETAS[0])
    for i in on():
        G, Q, M = grads[i].double(), bases[i].double(), moments[i].read(slice(0, case.shape[0])).double()
        X, off = mixed(G, M, BETAS[0] ** 2, case.dtype)
        found.add("Z", Z[i], X @ Q, (PRODUCT[case.dtype] * X.abs() + off) @ Q.abs())
        for name, column, of, of_off in (("X", 0, X, off), ("G", 1, G, 0 * off)):
            exact = of.norm(dim=1, keepdim=True)
            allowed = NORM * exact + of_off.norm(dim=1, keepdim=True)
            found.add(f"row norms of {name}", norms[i, :, column : column + 1], exact, allowed)
    return found


def check_one_X(ops: Any, case: Case, device: str) -> Errors:
    """Both passes mean the same X: where it alone is applied, to zeros, its norms and product are those of the first
    pass, closer than what X is rounded by."""
    inputs, found = Inputs(case, device), Errors()
    grads, bases, moments = inputs.gradients(), inputs.bases(), inputs.moments(False)
    project, apply_updates = of_moments(ops)
    Z, norms = project(grads, moments, bases, BETAS[0])
    weights = [torch.zeros_like(G, dtype=torch.float32) for G in grads]
    A, B = torch.zeros_like(Z), torch.ones_like(norms[..., :1])
    apply_updates(weights, grads, moments, A, B, bases, 1.0, BETAS[0], inputs.active, None, None)
    for i in on():
        X, Q = -weights[i].double(), bases[i].double()
        exact = X.norm(dim=1, keepdim=True)
        found.add("row norms of X", norms[i, :, :1], exact, NORM * exact)
        product = max(PRODUCT[case.dtype], PRODUCT[torch.bfloat16]) if case.dtype != torch.float32 else 2.0**-18
        found.add("Z", Z[i], X @ Q, product * (X.abs() @ Q.abs()))
    return found


def check_apply_moment_updates(is_packed: bool, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    weights, grads, bases = inputs.matrices(0.02), inputs.gradients(), inputs.bases()
    moments, long = inputs.moments(is_packed), case.shape[0]
    rows = slice(0, long)
    before, M = [W.clone() for W in weights], [moment.read(rows).double() for moment in moments]
    codes = [x.clone() for x in (moments[OFF].values, moments[OFF].scales) if x is not None]
    A, B, decay = 0.01 * inputs.low_rank(long), inputs.random(COUNT, long, 1).abs(), 0.99
    B[OFF] = torch.nan
    is_rounded, at_random = is_packed or case.state != torch.float32, case.dtype == torch.bfloat16
    seeds, of_state = [1, 2, 3] if at_random else None, [4, 5, 6] if is_rounded else None
    last = (inputs.active, seeds, of_state)
    of_moments(ops)[1](weights, grads, moments, A, B, bases, decay, BETAS[0], *last)
    u, p = roundoff(case.dtype, at_random), OF_UPDATE[case.dtype]
    for i in on():
        W, Q, b = before[i].double(), bases[i].double(), B[i].double()
        X, off = mixed(grads[i], M[i], BETAS[0] ** 2, case.dtype)
        exact = decay * (W - A[i].double() @ Q.T - b * X)
        movement = A[i].double().abs() @ Q.T.abs() + b * X.abs()
        found.add("W", weights[i], exact, u * exact.abs() + p * movement + b * off + FP32 * W.abs())
        new, off = mixed(grads[i], M[i], BETAS[0], torch.float32)
        if not is_packed:
            found.add("M", moments[i].read(rows), new, off + (is_rounded * roundoff(case.state, True)) * new.abs())
            continue
        # As it is stored: one of the two codes beside the value, of the scale that is the next bf16 above the exact.
        stored, scales = new.T if moments[i].is_turned else new, moments[i].scales
        most = 127 if moments[i].values.dtype == torch.int8 else 7
        groups = torch.nn.functional.pad(stored, (0, -stored.shape[1] % whole.GROUP)).unflatten(1, (-1, whole.GROUP))
        least = groups.abs().amax(2) / most
        found.add("scales", scales, least * (1 + 2.0**-8), least * (2.0**-8 + 2.0**-16))
        step = scales.double().repeat_interleave(whole.GROUP, 1)[:, : stored.shape[1]]
        found.add("M", moments[i].read(rows), new, (1 + 2.0**-10) * (step.T if moments[i].is_turned else step))
        decoded = whole.decode(moments[i].values, scales, groups.shape[1] * whole.GROUP)
        found.same("filling", decoded[:, stored.shape[1] :], 0 * decoded[:, stored.shape[1] :])
    found.same("not active", weights[OFF], before[OFF])
    for old, value in zip(codes, (moments[OFF].values, moments[OFF].scales), strict=False):
        found.same("not active", value, old)
    return found


def check_rounding_moments(ops: Any, case: Case, device: str) -> Errors:
    """The mean of codes is the value; the draws differ by seed, and from those of the weight."""
    found, (long, short) = Errors(), case.shape
    active, Q = torch.ones(COUNT, dtype=torch.bool, device=device), torch.zeros(short, case.rank, device=device)
    A, B = torch.zeros(COUNT, long, case.rank, device=device), torch.zeros(COUNT, long, 1, device=device)
    decay = 1 - 2.0**-10
    for bits in (8, 4):
        G = torch.full((long, short), 0.75, dtype=torch.bfloat16, device=device)
        G[:, :: whole.GROUP] = 2 ** (bits - 1) - 1  # the scale is 1

        def rounded(
            seeds: list[int], bits: int = bits, G: Tensor = G
        ) -> tuple[list[whole.Whole], list[Tensor], list[Tensor]]:
            weights = [torch.ones_like(G) for _ in range(COUNT)]
            moments = [whole.Whole(*whole.encode(torch.zeros_like(G).float(), bits), short, False) for _ in weights]
            last = (0.0, active, seeds, [seed + 100 for seed in seeds])
            of_moments(ops)[1](weights, [G] * COUNT, moments, A, B, [Q] * COUNT, decay, *last)
            free = torch.arange(short, device=device) % whole.GROUP > 0
            up = [(W[:, free].double() - (1 - 2.0**-8)) * 2.0**8 for W in weights]
            return moments, [moment.read(slice(0, long))[:, free].double() for moment in moments], up

        first, again, other = rounded([1, 2, 3]), rounded([1, 2, 3]), rounded([4, 5, 6])
        for i, (values, up) in enumerate(zip(*first[1:], strict=True)):
            found.put(f"neighbours, {bits} bits", 0.0, 2.0 * ((values != 0) & (values != 1)).any().item())
            for name, ones, chance in ((f"mean, {bits} bits", values, 0.75), ("both up", values * up, 0.75**2)):
                error = abs(ones.mean().item() - chance)
                found.put(name, error, error * (ones.numel() / (chance * (1 - chance))) ** 0.5 / STANDARD_ERRORS)
            found.same("the same seed", first[0][i].values, again[0][i].values)
            found.put("another seed", 0.0, 2.0 * torch.equal(values, other[1][i]) + 2.0 * torch.equal(values, up))
    return found


def check_dense_adamw(ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    weights, grads = inputs.matrices(0.02), inputs.matrices(0.02)
    M = [torch.empty_like(W, dtype=case.state).copy_(0.02 * inputs.random(*W.shape)) for W in weights]
    V = [torch.empty_like(W, dtype=case.state).copy_(0.02 * inputs.random(*W.shape).square()) for W in weights]
    before = [[x.clone() for x in of] for of in (weights, M, V)]
    made = (0.0, 7.0, 1000.0)  # updates before this one
    (b1, b2), lr, decay = BETAS, 0.01, 0.1
    settings = {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": decay}
    of_weights = [1, 2, 3] if case.dtype == torch.bfloat16 else [None] * COUNT
    of_state = [4, 5, 6] if case.state != torch.float32 else [None] * COUNT
    for finite in (False, True):
        now, counts = torch.tensor(finite, device=device), [torch.tensor(t, device=device) for t in made]
        ops.dense_adamw(weights, grads, M, V, counts, now, of_weights, of_state, settings)
        for old, new in zip(before, (weights, M, V), strict=True):
            for i in range(0 if finite else COUNT):
                found.same("not finite", new[i], old[i])
    u, of_moments = roundoff(case.dtype, of_weights[0] is not None), roundoff(case.state, of_state[0] is not None)
    for i in range(COUNT):
        W, m, v = (of[i].double() for of in before)
        g, t = grads[i].double(), made[i] + 1
        parts = b1 * m.abs() + (1 - b1) * g.abs()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
        found.add("M", M[i], m, of_moments * m.abs() + FP32 * parts)
        found.add("V", V[i], v, (of_moments + FP32) * v)
        over = lr / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + EPS)
        exact = (1 - lr * decay) * W - over * m
        found.add("W", weights[i], exact, u * exact.abs() + 8 * FP32 * (W.abs() + over * parts))
    return found


def check_rounding(ops: Any, case: Case, device: str) -> Errors:
    """At random between two neighbours: the mean is the value, the draws differ by seed, and only by it."""
    found, (long, short), rank = Errors(), case.shape, case.rank
    active = torch.ones(COUNT, dtype=torch.bool, device=device)
    zeros = torch.zeros(COUNT, long, rank, device=device)
    Q, decay = torch.zeros(short, rank, device=device), 1 - 2.0**-10

    def rounded(seeds: list[int]) -> dict[str, list[Tensor]]:
        weights = [torch.ones(long, short, dtype=torch.bfloat16, device=device) for _ in range(COUNT)]
        grads = [torch.zeros_like(W) for W in weights]
        B = torch.zeros(COUNT, long, 1, device=device)
        a = torch.ones(COUNT, 1, 1, device=device)
        ops.apply_updates(weights, grads, zeros.clone(), None, a, 0.0, B, [Q] * COUNT, decay, active, seeds)
        stored = [[torch.ones(long, rank, dtype=torch.bfloat16, device=device) for _ in "123"] for _ in "MV"]
        of_moments = [[seed + 100 * k for seed in seeds] for k in (1, 2)]
        ops.direction("adamw", zeros.clone(), stored, (decay, decay), EPS, active, of_moments)
        return {"W": weights, "M": stored[0], "V": stored[1]}

    first, again, other = rounded([1, 2, 3]), rounded([1, 2, 3]), rounded([4, 5, 6])
    step = 2.0**-8  # between the bf16 below 1 and 1
    for name, values in first.items():
        for i, value in enumerate(values):
            up = ((value.double() - (1 - step)) / step).flatten()  # 0 or 1, at a chance of 3/4
            deviation = abs(up.mean().item() - 0.75) * (len(up) / (0.75 * 0.25)) ** 0.5
            found.put(f"mean of {name}", abs(value.double().mean().item() - decay), deviation / STANDARD_ERRORS)
            found.same(f"{name} of the same seed", value, again[name][i])
            drawn_alike = torch.equal(value, other[name][i]) or torch.equal(value, values[i - 1])
            found.put(f"{name} of another seed", 0.0, 2.0 if drawn_alike else 0.0)
            odd = ((up != 0) & (up != 1)).any().item()
            found.put(f"neighbours of {name}", 0.0, 2.0 if odd else 0.0)
    return found


CHECKS: dict[str, tuple[str, Callable[[Any, Case, str], Errors]]] = {  # check -> the function, and how
    "project": ("project", functools.partial(check_project, False)),
    "project, columns": ("project", functools.partial(check_project, True)),
    "direction, adamw": ("direction", functools.partial(check_direction, "adamw")),
    "direction, lion": ("direction", functools.partial(check_direction, "lion")),
    "rounding at random": ("apply_updates", check_rounding),
    "rounding at random, moment": ("apply_moment_updates", check_rounding_moments),
    "project, moment": ("project_moments", functools.partial(check_project_moments, False)),
    "project, packed moment": ("project_moments", functools.partial(check_project_moments, True)),
    "project and apply_updates, one X": ("apply_moment_updates", check_one_X),
    "apply_updates, moment": ("apply_moment_updates", functools.partial(check_apply_moment_updates, False)),
    "apply_updates, packed moment": ("apply_moment_updates", functools.partial(check_apply_moment_updates, True)),
    "transposed_products": ("transposed_products", check_transposed_products),
    "dense_adamw": ("dense_adamw", check_dense_adamw),
    "apply_updates": ("apply_updates", functools.partial(check_apply_updates, True, True, False)),
    "apply_updates, without R": ("apply_updates", functools.partial(check_apply_updates, False, True, False)),
    "apply_updates, columns": ("apply_updates", functools.partial(check_apply_updates, True, True, True)),
    "apply_updates, low-rank": ("apply_updates", functools.partial(check_apply_updates, True, False, False)),
    "apply_updates, columns alone": ("apply_updates", functools.partial(check_apply_updates, True, False, True)),
}


def run(check: str, kernels: Any, axes: tuple[tuple[Any, ...], ...], device: str, seconds: float) -> dict[str, Any]:
    """Case -> what was found of the kernel, and of the torch code where it has the function. No case is begun when the
    seconds have passed."""
    name, function = CHECKS[check]
    every = list(cases(axes))
    if check.startswith("rounding at random"):
        every = [Case(torch.bfloat16, shape, axes[2][0], "tall", torch.bfloat16) for shape in axes[1]]
    start, rows, wrong = time.perf_counter(), {}, []
    for case in every:
        if time.perf_counter() - start > seconds:
            break
        row: dict[str, Any] = {}
        for label, ops in (("kernel", kernels), ("torch", functional)):
            if not hasattr(ops, name) and not (ops is functional and "moment" in name):
                continue
            try:
                row[label] = function(ops, case, device).found
            except Exception as error:  # whatever a compiler says
                row[label] = {"error": errors.named(error)}
        kernel = row["kernel"]
        row["ok"] = "error" not in kernel and all(of["worst"] <= 1 for of in kernel.values())
        rows[str(case)] = row
        if not row["ok"]:
            wrong.append(f"{case}: {kernel['error'] if 'error' in kernel else _worst(kernel)}")
    return {"cases": rows, "left_out": len(every) - len(rows), "wrong": wrong}


def _worst(found: dict[str, dict[str, float]]) -> str:
    name = max(found, key=lambda key: found[key]["worst"])
    return f"{name} is off by {found[name]['worst']:.3g} times what it may be"
