"""What the kernels in `kernels` are made of: products and roundings of tiles, and a whole moment tile by tile.

A moment's tile is read and written as it is stored, (rows, columns), where groups of neighbours share a scale; so its
columns begin at a multiple of `GROUP` and are a multiple of it. What is outside is read as zero, and codes that fill
up a group are those of zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import functional as F
from . import whole

GROUP = tl.constexpr(whole.GROUP)
BYTES = tl.constexpr(whole.GROUP // 2)  # of a group in 4 bits
TINY = tl.constexpr(F.TINY)


@triton.jit
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bf16 as integers
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc)


INTERPRETED = isinstance(dot, InterpretedFunction)


@triton.jit
def pointer(cell, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a cell of a table. `ALIGNED`: it is a multiple of 16, which a compiler cannot know of what is
    loaded; without, elements are read and written one by one."""
    found = tl.load(cell).to(tl.pointer_type(dtype))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _mixed(x, between):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (x >> 15) ^ between
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draws(seed, i):
    """32 random bits for each number i of an element.

    A hash of seed and number (Wellons' lowbias32, with half of the seed between its two rounds), in a fifth of the
    instructions of a cryptographic one: what rounding asks of its noise is that it is uniform, and unrelated between
    elements, weights and steps. Nobody gains by guessing it.
    """
    low = _mixed((seed & 0xFFFFFFFF).to(tl.uint32), 0)  # seeds are often neighbours
    high = _mixed((seed >> 32).to(tl.uint32) ^ low, 0)
    return _mixed(i.to(tl.uint32) + low, high)


@triton.jit
def rounded(x, seed, i, dtype: tl.constexpr, AT_RANDOM: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (fp32) in a dtype; a bf16 at random as one of its neighbours, by draws for the numbers i."""
    if AT_RANDOM:
        return rounded_by(x, draws(seed, i) >> 16, dtype, True, INTERPRETED)
    return rounded_by(x, 0, dtype, False, INTERPRETED)


@triton.jit
def rounded_by(x, noise, dtype: tl.constexpr, AT_RANDOM: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (fp32) in a dtype; a bf16 by 16 random bits: what they carry over rounds up."""
    if AT_RANDOM:
        x = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off what a device rounds to nearest
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def halves(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (fp32) as a sum of two of a narrower dtype."""
    high = rounded_by(x, 0, dtype, False, INTERPRETED)
    return high, rounded_by(x - high.to(tl.float32), 0, dtype, False, INTERPRETED)


@triton.jit
def looked_ahead(m, g, beta, ahead, G_DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """X of `whole`; `ahead` is 1 - beta^2. Beside half-precision gradients it is a bf16, since the first pass takes
    its product with a basis. Both passes must mean the same X: a compiler is not left to choose what it fuses."""
    x = tl.fma(beta * beta, m, ahead * g)
    if tl.float32 != G_DTYPE:
        x = rounded_by(x, 0, tl.bfloat16, False, INTERPRETED).to(tl.float32)
    return x


@triton.jit
def moved(r, m, v, inside, b1, b2, c1, c2, eps, BASE: tl.constexpr):
    """N, M and V of `functional.direction` from tiles of R, M and V. Muon's N is yet to be orthogonalized; V is Adam's
    alone. c1 and c2 are 1 - b1 and 1 - b2."""
    if BASE == "lion":
        mixed = b1 * m + c1 * r
        n = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
        m = b2 * m + c2 * r
    else:
        m = b1 * m + c1 * r
        if BASE == "muon":
            n = b1 * m + c1 * r
        else:
            v = b2 * v + c2 * r * r
            n = tl.where(inside, m / (tl.sqrt(v) + eps), 0.0)
    return n, m, v


@triton.jit
def _read_scales(
    scales, first_row, first_column, rows, columns, s_row,
    MOMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if MOMENT == "float":
        scale = 0.0
    else:
        i = (tl.arange(0, ROWS) + first_row).to(tl.int64)
        group = (tl.arange(0, COLUMNS // GROUP) + first_column // GROUP).to(tl.int64)
        is_group = (i[:, None] < rows) & (group[None, :] * GROUP < columns)
        scale = tl.load(scales + i[:, None] * s_row + group[None, :], mask=is_group, other=0.0)
    return scale


@triton.jit
def _read_stored(
    values, scale, first_row, first_column, rows, columns, m_row,
    MOMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = (tl.arange(0, ROWS) + first_row).to(tl.int64)
    j = (tl.arange(0, COLUMNS) + first_column).to(tl.int64)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    if MOMENT == "float":
        m = tl.load(values + i[:, None] * m_row + j[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        group = (tl.arange(0, GROUPS) + first_column // GROUP).to(tl.int64)
        is_group = (i[:, None] < rows) & (group[None, :] * GROUP < columns)
        if MOMENT == "int4":
            place = (i[:, None] * m_row + group[None, :] * BYTES)[:, :, None] + tl.arange(0, BYTES)[None, None, :]
            byte = tl.load(values + place, mask=is_group[:, :, None], other=0).to(tl.int32)
            both = tl.permute(tl.join(byte & 15, byte >> 4), (0, 1, 3, 2))  # the low ones of a group come first
            codes = tl.reshape(both, (ROWS, GROUPS, GROUP)) - 8
        else:
            place = (i[:, None] * m_row + group[None, :] * GROUP)[:, :, None] + tl.arange(0, GROUP)[None, None, :]
            codes = tl.load(values + place, mask=is_group[:, :, None], other=0)
        m = tl.reshape(codes.to(tl.float32) * scale.to(tl.float32)[:, :, None], (ROWS, COLUMNS))
        m = tl.where(inside, m, 0.0)
    return m


@triton.jit
def _write_stored(
    m, noise, values, scales, first_row, first_column, rows, columns, m_row, s_row,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, AT_RANDOM: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = (tl.arange(0, ROWS) + first_row).to(tl.int64)
    if MOMENT == "float":
        j = (tl.arange(0, COLUMNS) + first_column).to(tl.int64)
        inside = (i[:, None] < rows) & (j[None, :] < columns)
        m = rounded_by(m, noise, M_DTYPE, AT_RANDOM, INTERPRETED)
        tl.store(values + i[:, None] * m_row + j[None, :], m, mask=inside)
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        MOST: tl.constexpr = 7.0 if MOMENT == "int4" else 127.0
        group = (tl.arange(0, GROUPS) + first_column // GROUP).to(tl.int64)
        is_group = (i[:, None] < rows) & (group[None, :] * GROUP < columns)
        m = tl.reshape(m, (ROWS, GROUPS, GROUP))
        scale = tl.maximum(tl.max(tl.abs(m), axis=2) / MOST, TINY)
        # To the next bf16 above, as in `whole.encode`.
        scale = ((scale.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(scales + i[:, None] * s_row + group[None, :], scale.to(tl.bfloat16), mask=is_group)
        codes = m / scale[:, :, None]
        if AT_RANDOM:  # a half makes the mean of what is added that of all numbers from 0 to 1
            codes += (tl.reshape(noise, (ROWS, GROUPS, GROUP)).to(tl.float32) + 0.5) * (1 / 65536)
        else:
            codes += 0.5
        codes = tl.minimum(tl.maximum(tl.floor(codes), -MOST), MOST)
        if MOMENT == "int4":
            both = tl.reshape((codes + 8).to(tl.int32), (ROWS, GROUPS, 2, BYTES))
            low, high = tl.split(tl.permute(both, (0, 1, 3, 2)))
            place = (i[:, None] * m_row + group[None, :] * BYTES)[:, :, None] + tl.arange(0, BYTES)[None, None, :]
            tl.store(values + place, (low | (high << 4)).to(tl.uint8), mask=is_group[:, :, None])
        else:
            place = (i[:, None] * m_row + group[None, :] * GROUP)[:, :, None] + tl.arange(0, GROUP)[None, None, :]
            tl.store(values + place, codes.to(tl.int8), mask=is_group[:, :, None])


@triton.jit
def read_scales(
    scales, first_row, first_column, long, short, s_row,
    MOMENT: tl.constexpr, IS_TURNED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of the groups in such a tile, as `read_moment` takes them. They are too small to be copied into shared memory
    ahead of their use, so that a loop asks for those of its next turn."""
    if IS_TURNED:
        scale = _read_scales(scales, first_column, first_row, short, long, s_row, MOMENT, BLOCK_S, BLOCK_L)
    else:
        scale = _read_scales(scales, first_row, first_column, long, short, s_row, MOMENT, BLOCK_L, BLOCK_S)
    return scale


@triton.jit
def read_moment(
    values, scale, first_row, first_column, long, short, m_row,
    MOMENT: tl.constexpr, IS_TURNED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The tile (BLOCK_L, BLOCK_S) of the matrix with its long side first, fp32."""
    if IS_TURNED:
        m = tl.trans(
            _read_stored(values, scale, first_column, first_row, short, long, m_row, MOMENT, BLOCK_S, BLOCK_L)
        )
    else:
        m = _read_stored(values, scale, first_row, first_column, long, short, m_row, MOMENT, BLOCK_L, BLOCK_S)
    return m


@triton.jit
def write_moment(
    m, noise, values, scales, first_row, first_column, long, short, m_row, s_row,
    MOMENT: tl.constexpr, M_DTYPE: tl.constexpr, IS_TURNED: tl.constexpr, AT_RANDOM: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes such a tile, which is zero outside; `noise`: 16 random bits for each element."""
    if IS_TURNED:
        _write_stored(
            tl.trans(m), tl.trans(noise), values, scales, first_column, first_row, short, long, m_row, s_row,
            MOMENT, M_DTYPE, AT_RANDOM, INTERPRETED, BLOCK_S, BLOCK_L,
        )  # fmt: skip
    else:
        _write_stored(
            m, noise, values, scales, first_row, first_column, long, short, m_row, s_row,
            MOMENT, M_DTYPE, AT_RANDOM, INTERPRETED, BLOCK_L, BLOCK_S,
        )  # fmt: skip
