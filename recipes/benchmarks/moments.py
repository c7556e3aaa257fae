"""Whether the kernels of a moment of the weight's size compute what they should: checks beside those of `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fira_hf import whole
from fira_hf.matrices import operations_of_moments
from recipes.benchmarks.cases import (
    BETAS,
    COUNT,
    FP32,
    NORM,
    OF_UPDATE,
    OFF,
    PRODUCT,
    STANDARD_ERRORS,
    Case,
    Errors,
    Inputs,
    on,
    roundoff,
)


def mixed(G: Tensor, M: Tensor, beta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """beta M + (1 - beta) G in fp64, and what it may be off where it is rounded to a dtype."""
    parts = beta * M.abs() + (1 - beta) * G.double().abs()
    exact = beta * M + (1 - beta) * G.double()
    return exact, FP32 * parts + (0 if dtype == torch.float32 else roundoff(torch.bfloat16)) * exact.abs()


def check_project(is_packed: bool, ops: Any, case: Case, device: str) -> Errors:
    inputs, found = Inputs(case, device), Errors()
    grads, bases, moments = inputs.gradients(), inputs.bases(), inputs.moments(is_packed)
    Z, norms = operations_of_moments(ops)[0](grads, moments, bases, BETAS[0])
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
    project, apply_updates = operations_of_moments(ops)
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


def check_apply_updates(is_packed: bool, ops: Any, case: Case, device: str) -> Errors:
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
    operations_of_moments(ops)[1](weights, grads, moments, A, B, bases, decay, BETAS[0], *last)
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


def check_rounding(ops: Any, case: Case, device: str) -> Errors:
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
            operations_of_moments(ops)[1](weights, [G] * COUNT, moments, A, B, [Q] * COUNT, decay, *last)
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
