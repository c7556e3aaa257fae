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
from typing import Any

import torch
from torch import Tensor

from fira_hf import functional, int8
from recipes import errors
from recipes.benchmarks import moments
from recipes.benchmarks.cases import (
    BETA2_ROUNDED,
    BETAS,
    COUNT,
    EPS,
    FP32,
    LAYOUTS,
    NORM,
    OF_UPDATE,
    OFF,
    PRODUCT,
    SCALE,
    STANDARD_ERRORS,
    Case,
    Errors,
    Inputs,
    on,
    roundoff,
    row_counts,
)

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


def as_matrix(Q: Any, short: int, device: str) -> Tensor:
    """The basis in fp64; of a range of columns, what picks them."""
    if isinstance(Q, Tensor):
        return Q.double()
    place = torch.arange(short, device=device).view(-1, 1)
    return (place == torch.arange(Q.start, Q.stop, device=device)).double()


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
    # Of what is fp32 throughout, or does not lie alike, torch's own kernel makes the step, which rounds 1 - b2.
    is_fp32 = case.dtype == case.state == torch.float32
    of_b2 = BETA2_ROUNDED if ops is functional or is_fp32 or case.layout == "strided" else 0.0
    for i in range(COUNT):
        W, m, v = (of[i].double() for of in before)
        g, t = grads[i].double(), made[i] + 1
        parts = b1 * m.abs() + (1 - b1) * g.abs()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
        found.add("M", M[i], m, of_moments * m.abs() + FP32 * parts)
        found.add("V", V[i], v, (of_moments + FP32) * v + of_b2 * g.square())
        over = lr / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + EPS)
        exact = (1 - lr * decay) * W - over * m
        found.add("W", weights[i], exact, u * exact.abs() + 8 * FP32 * (W.abs() + over * parts))
    return found


def check_advance(ops: Any, case: Case, device: str) -> Errors:
    """Which gradients are usable, the counts of updates and their size; of one row, and of more than a program takes
    at once. Of norms of two matrices the last ones count."""
    inputs, found = Inputs(case, device), Errors()
    # The square of 1e30, below, is not finite in fp32, and that of 1e-12 not zero.
    sizes = torch.tensor([1.0, torch.nan, 1.0, 0.0, torch.inf, 1.0, 1e-12, 1.0], device=device)
    usable = torch.tensor([True, False, True, False, False, False, True, True], device=device)
    made = (0.0, 3.0, 7.0, 0.0, 7.0, 1000.0, 1.0, 1e6)  # updates before this one
    ways = ((0.9, 0.999), (0.0, 0.95), (0.5, 0.0), None)
    for rows, width, betas in itertools.product(row_counts(case), (1, 2), ways):
        norms = sizes.view(-1, 1, 1) * (0.1 + inputs.random(len(sizes), rows, 1).abs())
        norms[1, :-1] = 1.0  # of all rows the last alone is NaN
        norms[5] = 1e30 if rows > 1 else torch.inf  # of one number torch makes no square
        given = norms if width == 1 else torch.cat([torch.full_like(norms, torch.nan), norms], dim=2)
        steps = [torch.tensor(t, device=device) for t in made]
        counts = [step.double() for step in steps]
        active, eta = ops.advance(given, steps, 0.01, betas)
        _, exact = functional.advance(torch.where(usable.view(-1, 1, 1), norms.double(), 0.0), counts, 0.01, betas)
        found.same("active", active, usable)
        found.same("steps", torch.stack(steps).double(), torch.tensor(made, device=device).double() + usable)
        found.add("eta", eta, exact, SCALE * exact)
    return found


def check_scales(ops: Any, case: Case, device: str) -> Errors:
    """With a history that limits and one that does not, with none, with a negligible residual, and of matrices that
    are not active, whose gradients are not finite or zero."""
    inputs, found = Inputs(case, device), Errors()
    active = torch.tensor([True, False, True, True, False, True], device=device)
    eta = (0.01 * torch.arange(1.0, len(active) + 1, device=device) * active).view(-1, 1, 1)
    limiters = (("growth", 1.01), ("shrink", 0.6), ("scale", 0.6), ("growth", None))
    parts = ((1.0, 0.25), (0.25, 1.0), (0.0, 1.0))  # (s, k)
    ways = list(itertools.product(("column", "matrix", "none"), limiters))
    # Of parts the next one in turn, so that each meets each way to scale and each limiter.
    for rows, (turn, (scaling, (limiter, gamma))) in itertools.product(row_counts(case), enumerate(ways)):
        s, k = parts[turn % len(parts)]
        G, N = (0.1 + inputs.random(len(active), rows, 1).abs() for _ in range(2))
        R = G * (0.3 + 0.4 * torch.rand(G.shape, generator=inputs.generator, device=device))
        R[0, 0], N[0, 0] = 1e-8, 1e-8  # where the epsilon counts
        R[3] = (1 - 2.0**-23) * G[3]  # at k = 1 less than a thousandth is left
        G[1].fill_(torch.nan)[::2] = torch.inf
        G[4] = 0.0
        R[~active], N[~active] = 0.0, 0.0  # as `direction` gives them
        # Beside the norm of so many rows.
        before = rows**0.5 * torch.tensor([0.01, 3.0, torch.inf, 0.5, 2.0, 100.0], device=device)
        histories = list(before.clone().unbind())
        kept = [x.double() for x in histories]
        settings = functional.Scales(0.25, s, k, scaling, gamma, limiter, functional.NEGLIGIBLE)
        got = ops.scales(G, R, N, eta, histories, settings, active)
        exact = functional.scales(*(x.double() for x in (G, R, N, eta)), kept, settings, active)
        found.same("not active", torch.stack(histories)[~active], before[~active])
        outputs = zip(("history", "a", "B", "residual", "c"), (histories, *got), (kept, *exact), strict=True)
        for name, value, right in outputs:
            if name == "history":
                value, right = torch.stack(value), torch.stack(right)
            if name in ("residual", "c"):  # of what is not active nobody reads these, which are for statistics
                value, right = value[active], right[active]
            for what in (torch.isnan, torch.isinf):
                found.same(f"{name}: {what.__name__}", what(value), what(right))
            finite = torch.isfinite(right)
            found.add(name, value[finite], right[finite], SCALE * right[finite].abs())
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


def check_int8_updates(has_B: bool, ops: Any, case: Case, device: str) -> Errors:
    """Each value within a code of the exact one, with its mean; no scale cuts anything off."""
    inputs, found = Inputs(case, device), Errors()
    grads, bases, (long, short) = inputs.gradients(), inputs.bases(), case.shape
    is_turned = case.layout in ("wide", "fused")
    shape = (short, long) if is_turned else (long, short)
    codes = [(127 * torch.tanh(inputs.random(*shape))).round().to(torch.int8) for _ in range(COUNT)]
    scales = [(1e-3 * (1 + inputs.random(shape[0], 1).abs())).to(case.dtype) for _ in range(COUNT)]
    weights = [int8.Int8Weight(c, s, is_turned) for c, s in zip(codes, scales, strict=True)]
    before = [(c.clone(), s.clone()) for c, s in zip(codes, scales, strict=True)]

    def value(i: int) -> Tensor:
        found = codes[i].double() * scales[i].double()
        return found.t() if is_turned else found

    W = [value(i) for i in range(COUNT)]
    N, R = inputs.low_rank(long), 0.1 * inputs.low_rank(long)
    a = 0.01 * torch.arange(1.0, COUNT + 1, device=device).view(COUNT, 1, 1)
    B, k, decay = inputs.random(COUNT, long, 1).abs(), 0.25, 0.99
    B[OFF] = torch.nan
    update = int8.apply_updates if ops is functional else ops.apply_int8_updates
    update(weights, grads, N.clone(), R, a, k, B if has_B else None, bases, decay, inputs.active, [1, 2, 3])
    B = B if has_B else torch.zeros_like(B)
    for i in on():
        G, Q, b = grads[i].double(), bases[i].double(), B[i].double()
        A = a[i].double() * N[i].double() - k * b * R[i].double()
        parts = (a[i] * N[i]).double().abs() + k * b * R[i].double().abs()
        exact = decay * (W[i] - A @ Q.T - b * G)
        rounding = OF_UPDATE[torch.float32 if case.dtype == torch.float32 else torch.bfloat16]
        off = rounding * (parts @ Q.T.abs() + b * G.abs()) + FP32 * W[i].abs()
        scale = scales[i].double().t() if is_turned else scales[i].double()
        found.add("W", value(i), exact, scale + off)
        largest = (exact.abs() - off).amax(dim=0 if is_turned else 1, keepdim=True)
        found.put("scale", 0.0, (largest / (127 * scale)).max().item())
        mean, error = ((value(i) - exact) / scale).mean().abs().item(), 0.5 / exact.numel() ** 0.5
        found.put("mean", mean, mean / (STANDARD_ERRORS * error + (off / scale).mean().item()))
    for old, new in zip(before[OFF], (codes[OFF], scales[OFF]), strict=True):
        found.same("not active", new, old)
    return found


CHECKS: dict[str, tuple[str, Callable[[Any, Case, str], Errors]]] = {  # check -> the function, and how
    "project": ("project", functools.partial(check_project, False)),
    "project, columns": ("project", functools.partial(check_project, True)),
    "direction, adamw": ("direction", functools.partial(check_direction, "adamw")),
    "direction, lion": ("direction", functools.partial(check_direction, "lion")),
    "rounding at random": ("apply_updates", check_rounding),
    "rounding at random, moment": ("apply_moment_updates", moments.check_rounding),
    "project, moment": ("project_moments", functools.partial(moments.check_project, False)),
    "project, packed moment": ("project_moments", functools.partial(moments.check_project, True)),
    "project and apply_updates, one X": ("apply_moment_updates", moments.check_one_X),
    "apply_updates, moment": ("apply_moment_updates", functools.partial(moments.check_apply_updates, False)),
    "apply_updates, packed moment": (
        "apply_moment_updates",
        functools.partial(moments.check_apply_updates, True),
    ),
    "transposed_products": ("transposed_products", check_transposed_products),
    "dense_adamw": ("dense_adamw", check_dense_adamw),
    "advance": ("advance", check_advance),
    "scales": ("scales", check_scales),
    "apply_updates": ("apply_updates", functools.partial(check_apply_updates, True, True, False)),
    "apply_updates, without R": ("apply_updates", functools.partial(check_apply_updates, False, True, False)),
    "apply_updates, columns": ("apply_updates", functools.partial(check_apply_updates, True, True, True)),
    "apply_updates, low-rank": ("apply_updates", functools.partial(check_apply_updates, True, False, False)),
    "int8 updates": ("apply_int8_updates", functools.partial(check_int8_updates, True)),
    "int8 updates, low-rank": ("apply_int8_updates", functools.partial(check_int8_updates, False)),
    "apply_updates, columns alone": ("apply_updates", functools.partial(check_apply_updates, True, False, True)),
}


def run(check: str, kernels: Any, axes: tuple[tuple[Any, ...], ...], device: str, seconds: float) -> dict[str, Any]:
    """Case -> what was found of the kernel, and of the torch code where it has the function. No case is begun when the
    seconds have passed."""
    name, function = CHECKS[check]
    every = list(cases(axes))
    if check.startswith("rounding at random"):
        every = [Case(torch.bfloat16, shape, axes[2][0], "tall", torch.bfloat16) for shape in axes[1]]
    if name in ("advance", "scales"):  # of row norms alone, which are fp32
        every = [Case(torch.float32, shape, axes[2][0], "tall") for shape in axes[1]]
    start, rows, wrong = time.perf_counter(), {}, []
    for case in every:
        if time.perf_counter() - start > seconds:
            break
        row: dict[str, Any] = {}
        for label, ops in (("kernel", kernels), ("torch", functional)):
            if not hasattr(ops, name) and not (ops is functional and ("moment" in name or "int8" in name)):
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
