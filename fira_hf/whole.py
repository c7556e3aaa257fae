r"""A first moment of the weight's own size, in fp32, bf16, or codes of 8 or 4 bits: for residual="moment".

With M the moment before the step and b = beta1,

    M' = b M + (1 - b) G,    X = b M' + (1 - b) G = b^2 M + (1 - b^2) G      (Nesterov),

X takes the place of G in `functional`: Z = X Q is what base_optimizer="muon" makes N of, and the residual is the rest
of X, each row brought to the norm that it would have if the rest's singular values were 1, too:

    W <- (1 - lr wd) (W - eta [(N - phi Z) Q^T + phi X]),    phi_i = sqrt((short - r) / long) / ||X_i - Z_i Q^T||

The rows of N are brought to one norm as well, sqrt(r / long); NorMuon (arXiv 2510.05491) does so by a running mean. At
full rank nothing is left of X, and there is no basis: Z is X itself.

The first pass, `project`, reads gradient and moment and writes neither; the second, `apply_updates`, reads both again
and writes weight and moment. X exists block by block.

Codes: 32 neighbours along the last dimension of the weight as it is stored share a scale (bf16), their largest
absolute value divided by 127 or 7, and are integers of that range, rounded at random so that their mean is the value.
Of 4-bit codes a byte holds those of i (low) and i + 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional as F

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # values with one scale
# Of the mean of a matrix: below it a row is not brought to the size of the others. Where its gradient has stopped, its
# moment dies away and is rounding noise in the end, of which the row would be trained, if it were.
ALIVE = 1e-2
BLOCK = 2**18  # elements that are taken together: what is made of them stays in the cache


def scales_in(n: int) -> int:
    """How many scales a row of n codes has; the last group may be a short one."""
    return -(-n // GROUP)


def packed_shapes(shape: Sequence[int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of codes (int8, or uint8 with two 4-bit codes) and scales (bf16) of a tensor; groups are filled up."""
    *outer, last = shape
    groups = scales_in(last)
    return (*outer, groups * GROUP * bits // 8), (*outer, groups)


def encode(values: Tensor, bits: int, draws: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 values (..., n); to the nearest without `draws`. NaN and infinities have none."""
    most, n = 2 ** (bits - 1) - 1, values.shape[-1]
    values = torch.nn.functional.pad(values, (0, -n % GROUP)) if n % GROUP else values
    values = values.unflatten(-1, (-1, GROUP))
    scales = scales_above(values.abs().amax(-1).div_(most))
    codes = values / scales.float().unsqueeze(-1)
    if draws is None:
        codes = codes.round_()
    else:
        codes = codes.add_(_uniform(codes, draws)).floor_()
    codes = codes.clamp_(-most, most)  # the quotient may be an ulp above, which at random would round up
    if bits == 8:
        return codes.to(torch.int8).flatten(-2), scales
    low, high = codes.add_(8).chunk(2, dim=-1)
    return low.add(high, alpha=16).to(torch.uint8).flatten(-2), scales


def scales_above(sizes: Tensor) -> Tensor:
    """The next bf16 at or above, of fp32 that may be changed: cut off, the largest of a group would lose a part of
    itself at every step. Never zero."""
    bits = sizes.clamp_(min=F.TINY).view(torch.int32)
    return bits.add_(2**16 - 1).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def random_bits(like: Tensor, draws: torch.Generator | None) -> Tensor:
    """16 for each element, a signed int16: four of one draw of 64 bits."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=draws)
    return words.view(torch.int16)[: like.numel()].view(like.shape)


def _uniform(like: Tensor, draws: torch.Generator) -> Tensor:
    """In [0, 1), of 16 random bits each: with beta1 = 0.999 a code of 1 changes by a thousandth, and has to."""
    return random_bits(like, draws).to(torch.float32).add_(2**15 + 0.5).mul_(2**-16)


def decode(codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """fp32 (..., n); bits are those of the dtype."""
    if codes.dtype == torch.uint8:
        pairs = codes.unflatten(-1, (-1, GROUP // 2))
        values = torch.cat([pairs & 15, pairs >> 4], dim=-1).to(torch.float32).sub_(8)
    else:
        values = codes.unflatten(-1, (-1, GROUP)).to(torch.float32)
    return values.mul_(scales.float().unsqueeze(-1)).flatten(-2)[..., :n]


@dataclass(frozen=True)
class Whole:
    """The moment of one matrix, as it is stored: values (rows, columns), or codes and scales of so many.

    is_turned: with its long side first the matrix is the transposed of what is stored. Blocks of rows that are read or
    written then have to begin at a multiple of `GROUP`.
    """

    values: Tensor
    scales: Tensor | None
    columns: int
    is_turned: bool

    def _part(self, rows: slice) -> tuple[Tensor, Tensor | None, int]:
        if not self.is_turned:
            return self.values[rows], None if self.scales is None else self.scales[rows], self.columns
        if self.scales is None:
            return self.values[:, rows], None, 0
        per_byte = GROUP * self.scales.shape[1] // self.values.shape[1]
        codes = self.values[:, rows.start // per_byte : -(-rows.stop // GROUP) * GROUP // per_byte]
        return codes, self.scales[:, rows.start // GROUP : -(-rows.stop // GROUP)], rows.stop - rows.start

    def read(self, rows: slice) -> Tensor:
        """Rows of the matrix with its long side first, a copy in fp32."""
        values, scales, columns = self._part(rows)
        found = values.to(torch.float32, copy=True) if scales is None else decode(values, scales, columns)
        return found.t() if self.is_turned else found

    def write(self, rows: slice, new: Tensor, active: Tensor | None, draws: torch.Generator | None) -> None:
        """`active`: 0-dim bool on the device; where it is False, everything stays."""
        values, scales, _ = self._part(rows)
        new = new.t() if self.is_turned else new
        if scales is None:
            F.store(values, new if active is None else torch.where(active, new, values), draws)
            return
        for old, coded in zip(
            (values, scales), encode(new, 8 if values.dtype == torch.int8 else 4, draws), strict=True
        ):
            old.copy_(coded if active is None else torch.where(active, coded, old))


def _blocks(G: Tensor) -> Iterator[slice]:
    """Rows that are taken together: about `BLOCK` elements, in whole groups; on an accelerator all."""
    long, short = G.shape
    size = long if G.device.type != "cpu" else max(1, BLOCK // max(1, short) // GROUP) * GROUP
    for start in range(0, long, max(1, size)):
        yield slice(start, min(long, start + size))


def project(
    grads: Sequence[Tensor], moments: Sequence[Whole], bases: Sequence[F.Basis], beta: float
) -> tuple[Tensor, Tensor]:
    """Z = X Q, (B, long, r), and the norms of the rows of X and of G, (B, long, 2), both fp32. Writes nothing."""
    Z = grads[0].new_empty(len(grads), len(grads[0]), F.rank_of(bases[0]), dtype=torch.float32)
    norms = Z.new_empty(len(grads), Z.shape[1], 2)
    for i, (G, M, Q) in enumerate(zip(grads, moments, bases, strict=True)):
        for rows in _blocks(G):
            g = G[rows].float()
            x = M.read(rows).lerp_(g, 1 - beta**2)
            F.product(x, Q, Z[i, rows])
            norms[i, rows] = torch.cat([F.row_norms(x), F.row_norms(g)], dim=1)
    return Z, norms


def row_scale(
    X_norms: Tensor, Z_norms: Tensor, long: int, short: int, rank: int, negligible: float, add: F.Add = None
) -> tuple[Tensor, Tensor]:
    """phi, (B, long, 1), and the norm of the residual, (B, 1, 1), whose rows are alike; infinite where what lies
    outside the subspace is negligible.

    Rows whose rest is negligible beside them are left small: there the closed form is rounding noise. And so are
    those below a hundredth of what the rows of the matrix have on average.
    """
    left = (X_norms.square() - Z_norms.square()).clamp_(min=0).sqrt_()
    means = F.total_norms(torch.cat([left, X_norms], dim=-1), add) / math.sqrt(long)
    floor = (ALIVE * means[..., :1]).maximum(F.NEGLIGIBLE * means[..., 1:]).maximum(negligible * X_norms)
    phi = math.sqrt((short - rank) / long) / left.maximum(floor).clamp_(min=F.TINY)
    norm = F.total_norms(phi * left, add)
    return phi, torch.where(means[..., :1] > negligible * means[..., 1:], norm, torch.inf)


def equal_rows(N_norms: Tensor, long: int, rank: int) -> Tensor:
    """What makes the norms of the rows of N, (B, rows, 1), sqrt(r / long), which they are on average as N is nearly
    orthonormal; those below a hundredth of it stay small."""
    size = math.sqrt(rank / long)
    return size / N_norms.clamp(min=ALIVE * size)


def apply_updates(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Whole],
    A: Tensor,
    B: Tensor,
    bases: Sequence[F.Basis],
    decay: float,
    beta: float,
    active: Tensor | None,
    seeds: Sequence[int] | None,
    moment_seeds: Sequence[int] | None,
) -> None:
    """W <- decay (W - A Q^T - B X), M <- M', in place for each matrix. A: (B, long, r), B: (B, long, 1), fp32.

    `active`, `seeds` (of weights), `moment_seeds`: one for each matrix, or None; see `functional.apply_update`.
    """
    for i, (W, G, M, Q) in enumerate(zip(weights, grads, moments, bases, strict=True)):
        on = None if active is None else active[i]
        draws = F.generator(W, seeds[i] if seeds else None)
        draws_of_moment = F.generator(W, moment_seeds[i] if moment_seeds else None)
        for rows in _blocks(G):
            g, m = G[rows].float(), M.read(rows)
            F.apply_update(W[rows], m.lerp(g, 1 - beta**2), A[i, rows], Q, B[i, rows], decay, on, draws)
            M.write(rows, m.lerp_(g, 1 - beta), on, draws_of_moment)
