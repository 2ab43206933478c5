"""Operators that move numbers without changing them: Reshape and kin, Transpose, Concat, Split, Slice, Gather …

The gradient moves the same way back; numbers that were dropped get zero, numbers that were repeated get the
sum.
"""

from __future__ import annotations

from export.graph.registry import Step, rule
from export.graph.shapes import ONE, Dim, Shape, aligned_groups


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


@rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(step: Step) -> None:
    """Both are a reshape to six axes, a permutation, and a reshape: undone in the opposite order.

    DepthToSpace: [N, b, b, C, h, w] (DCR) or [N, C, b, b, h, w] (CRD) -> [N, C, h, b, w, b]. SpaceToDepth: the
    way back of DCR.
    """
    x, ops = step.x(), step.ops
    block = Dim(step.attribute("blocksize", 1))
    if step.node.op_type == "SpaceToDepth":
        inner, perm = (*x.shape[:2], *_blocks(x.shape[2:], block)), [0, 3, 5, 1, 2, 4]
    elif step.attribute("mode", "DCR") == "CRD":
        inner, perm = (
            (x.shape[0], step.y().shape[1], block, block, *x.shape[2:]),
            [0, 1, 4, 2, 5, 3],
        )
    else:
        inner, perm = (
            (x.shape[0], block, block, step.y().shape[1], *x.shape[2:]),
            [0, 3, 4, 1, 5, 2],
        )
    outer = tuple(inner[axis] for axis in perm)
    dy = ops.reshape(step.full(), outer)
    back = ops.transpose(dy, [perm.index(axis) for axis in range(6)])
    step.give(0, ops.reshape(back, x.shape))


def _blocks(sizes: Shape, block: Dim) -> Shape:
    """(h, w) -> (h/b, b, w/b, b)."""
    return tuple(part for dim in sizes for part in (Dim(dim.size // block.size), block))
