"""Shapes whose sizes are constants or multiples of the batch size N.

A gradient may be *under-broadcast*: where it is the same along an axis, that axis has size 1 instead of
the tensor's own size. `[N, C, 1, 1]` is then the whole gradient of an `[N, C, h, w]` map that a global mean
followed, and everything before it computes with h·w times fewer numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Dim(NamedTuple):
    """`size`, or `size * N` where `batched`."""

    size: int
    batched: bool = False

    def __str__(self) -> str:
        return (f"{self.size}N" if self.size > 1 else "N") if self.batched else str(self.size)


Shape = tuple[Dim, ...]
ONE = Dim(1)
BATCH = Dim(1, batched=True)


def fixed(sizes: Sequence[int]) -> Shape:
    """A shape that does not depend on N."""
    return tuple(Dim(int(size)) for size in sizes)


def describe(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def observed(at_two: Sequence[int], at_three: Sequence[int]) -> Shape | None:
    """The shape that is `at_two` for N = 2 and `at_three` for N = 3; None if nothing simple is."""
    if len(at_two) != len(at_three):
        return None
    dims = []
    for two, three in zip(at_two, at_three, strict=True):
        if two == three:
            dims.append(Dim(two))
        elif 3 * two == 2 * three:
            dims.append(Dim(two // 2, batched=True))
        else:
            return None
    return tuple(dims)


def broadcast(*shapes: Shape) -> Shape:
    """The shape numpy's rules give; sizes are trusted to agree, for the network has run."""
    rank = max((len(shape) for shape in shapes), default=0)
    padded = [(ONE,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(
        next((dim for dim in column if dim != ONE), ONE) for column in zip(*padded, strict=True)
    )


def elements(dims: Sequence[Dim]) -> tuple[int, int]:
    """(constant factor, power of N) of the number of elements."""
    return prod(dim.size for dim in dims), sum(dim.batched for dim in dims)


def aligned_groups(a: Shape, b: Shape) -> list[tuple[range, range]] | None:
    """Axes of `a` and of `b` in the smallest consecutive groups of equal element count; None if they differ.

    [N, 12, 8, 8] and [N, 3, 4, 64] align as N=N, 12=3*4, 8*8=64.
    """
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        start_i, start_j = i, j
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while (left := elements(a[start_i:i])) != (right := elements(b[start_j:j])):
            grow_left = j == len(b) or (i < len(a) and (left[1], left[0]) < (right[1], right[0]))
            if grow_left and i < len(a):
                i += 1
            elif j < len(b):
                j += 1
            else:
                return None
        groups.append((range(start_i, i), range(start_j, j)))
    return groups
