"""A weight as the matrices that a step takes: transposed, folded, unstacked, split; views where one will do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tall(matrix: Tensor) -> Tensor:
    """The matrix as it is, or its transposed view, so that rows >= columns. Square matrices stay."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()


def folded_shape(shape: torch.Size, convolution: bool) -> torch.Size:
    """(first, second * kernel) of a convolution's weight (first, second, *kernel); any other shape as it is."""
    return torch.Size((shape[0], shape[1:].numel())) if convolution else shape


def folded(kernels: Tensor, channels_last: bool) -> Tensor:
    """A convolution's weight or gradient (first, second, *kernel) as a matrix: its columns are (second, *kernel), or
    with `channels_last` (*kernel, second). A view if it `is_channels_last` just so, otherwise a copy."""
    return (kernels.movedim(1, -1) if channels_last else kernels).flatten(1)


def is_channels_last(kernels: Tensor) -> bool | None:
    """In which order of columns the weight of a convolution is a matrix without a copy; None: in neither."""
    for channels_last in (False, True):
        lying = kernels.movedim(1, -1) if channels_last else kernels
        steps = [(n, step) for n, step in zip(lying.shape[1:], lying.stride()[1:], strict=True) if n != 1]
        if all(step == n * inner for (_, step), (n, inner) in zip(steps[:-1], steps[1:], strict=True)):
            return channels_last
    return None


def parts(weight: Tensor, split: int, transposed: bool) -> list[Tensor]:
    """Views of the matrices in a weight, each (out / split, in): of every matrix of a stack (3-D), every fused part.
    A convolution's weight comes `folded`.

    `transposed`: the weight is stored (in, out), the other way round than that of `nn.Linear`.
    """
    found: list[Tensor] = []
    for matrix in weight.unbind() if weight.ndim == 3 else (weight,):
        matrix = matrix.t() if transposed else matrix
        found += matrix.chunk(split) if split > 1 else (matrix,)
    return found


def stacked(shape: Sequence[int], split: int) -> tuple[int, ...]:
    """(the number of matrices,) of a weight that stacks (3-D) or fuses several, () of one that is a matrix."""
    return ((shape[0] if len(shape) == 3 else 1) * split,) if len(shape) == 3 or split > 1 else ()


def long_and_short(shape: Sequence[int], split: int, transposed: bool) -> tuple[int, int]:
    """(long, short) of each of the matrices that a weight of this shape is, stacks or fuses; see `parts`."""
    rows, columns = shape[-2:]
    short, long = sorted((rows, columns // split) if transposed else (rows // split, columns))
    return long, short
