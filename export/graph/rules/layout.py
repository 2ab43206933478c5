"""Operators that move numbers without changing them: Reshape and kin, Transpose, Concat, Split, Slice, Gather …

The gradient moves the same way back; numbers that were dropped get zero, numbers that were repeated get the
sum.
"""

from __future__ import annotations

from export.graph.registry import Step, rule
from export.graph.shapes import ONE, Shape, aligned_groups


@rule("Identity", "Dropout")
def identity(step: Step) -> None:
    """y = x; Dropout, in inference, too."""
    step.give(0, step.dy)


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(step: Step) -> None:
    """The same numbers in row-major order under another shape, so dx is dy under x's shape.

    Axes are matched in groups of equal element count; a group on which dy is under-broadcast everywhere stays
    so.
    """
    x, y, dy = step.x(), step.y(), step.dy
    groups = aligned_groups(y.shape, x.shape)
    if groups is None:
        step.refuse("its input and output shapes do not match in number of elements")
    target: list[Shape] = []
    for from_axes, to_axes in groups:
        narrow = all(dy.shape[axis] == ONE for axis in from_axes)
        if not narrow:
            dy = step.ops.expand(dy, y, list(from_axes))
        target.append(tuple(ONE if narrow else x.shape[axis] for axis in to_axes))
    step.give(0, step.ops.reshape(dy, tuple(dim for group in target for dim in group)))


@rule("Transpose")
def transpose(step: Step) -> None:
    """y = permute(x), so dx = permute^-1(dy)."""
    rank = step.x().rank
    perm = step.attribute("perm", list(reversed(range(rank))))
    step.give(0, step.ops.transpose(step.dy, [perm.index(axis) for axis in range(rank)]))
