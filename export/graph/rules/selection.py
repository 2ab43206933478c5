"""Operators that pick, join or repeat parts of a tensor.

The gradient goes back to where each number came from: what was dropped gets zero, what was repeated gets the
sum.
"""

from __future__ import annotations

import numpy as np

from export.graph.emit import Value
from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to
from export.graph.rules.matrices import apply_along, one_hot_rows
from export.graph.shapes import ONE, Dim

_FAR = 2**31 - 1


@rule("Concat")
def concat(step: Step) -> None:
    """Each operand gets its own stretch of dy."""
    axis = step.attribute("axis", 0) % step.y().rank
    start = 0
    for i in range(len(step.node.input)):
        dim = step.x(i).shape[axis]
        if dim.batched:
            step.refuse("it joins images of the batch")
        if step.wants(i):
            dy = step.dy
            narrow = dy.shape[axis] == ONE
            step.give(i, dy if narrow else step.ops.slice(dy, axis, start, start + dim.size))
        start += dim.size


@rule("Split")
def split(step: Step) -> None:
    """x gets the gradients of the parts one after the other; a part nobody used gets zero."""
    ops, x = step.ops, step.x()
    axis = step.attribute("axis", 0) % x.rank
    parts = [step.y(i) for i in range(len(step.node.output))]
    sizes = [part.shape[axis].size for part in parts]
    used = [i for i, gradient in enumerate(step.gradients) if gradient]
    if len(used) == 1:
        (i,) = used
        step.give(0, ops.pad(_full(step, i, [axis]), axis, sum(sizes[:i]), sum(sizes[i + 1 :])))
        return
    given = [_full(step, i) for i in used]
    some = given[0]
    pieces = []
    for i, size in enumerate(sizes):
        if i in used:
            pieces.append(given[used.index(i)])
        else:
            zeros = ops.where(ops.constant(False, 9), ops.reduce("ReduceSum", some, [axis]), 0)
            like = Value("", (*some.shape[:axis], Dim(size), *some.shape[axis + 1 :]), x.dtype)
            pieces.append(ops.expand(zeros, like, [axis]))
    step.give(0, ops.concat(pieces, axis))


def _full(step: Step, i: int, axes: list[int] | None = None) -> Value:
    gradient = step.gradients[i]
    if gradient is None:
        raise ValueError("only used outputs have a gradient to expand")
    return step.ops.expand(gradient, step.y(i), axes)


@rule("Slice")
def slice_(step: Step) -> None:
    """y[i] = x[start + i step]; dx is dy with step - 1 zeros between and the dropped borders as zeros."""
    ops, x, dx = step.ops, step.x(), step.dy
    starts, ends = step.integers(1), step.integers(2)
    if starts is None or ends is None:
        step.refuse("it has no starts or ends")
    axes = step.integers(3) or list(range(len(starts)))
    steps = step.integers(4) or [1] * len(starts)
    for signed, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        axis = signed % x.rank
        if x.shape[axis] == step.y().shape[axis] and stride == 1:
            continue
        if x.shape[axis].batched:
            step.refuse("it picks images of the batch")
        size = x.shape[axis].size
        picked = list(range(size)[slice(start, end if end > -_FAR else None, stride)])
        if not picked:
            return
        like = Value(
            step.y().name, (*dx.shape[:axis], Dim(len(picked)), *dx.shape[axis + 1 :]), x.dtype
        )
        dx = ops.expand(dx, like, [axis])
        if stride < 0:
            dx, picked, stride = ops.reverse(dx, [axis]), picked[::-1], -stride
        if stride > 1:
            apart = ops.reshape(dx, (*dx.shape[: axis + 1], ONE, *dx.shape[axis + 1 :]))
            apart = ops.pad(apart, axis + 1, 0, stride - 1)
            spread = Dim(len(picked) * stride)
            dx = ops.reshape(apart, (*dx.shape[:axis], spread, *dx.shape[axis + 1 :]))
            dx = ops.slice(dx, axis, 0, picked[-1] - picked[0] + 1)
        dx = ops.pad(dx, axis, picked[0], size - picked[-1] - 1)
    step.give(0, dx)


@rule("Gather")
def gather(step: Step) -> None:
    """y[i] = x[index[i]] along one axis; dx[j] = sum of dy[i] over index[i] = j.

    A permutation is undone by its inverse, a stretch of neighbours by zeros around it, anything else by a
    matrix.
    """
    if step.wants(1):
        step.refuse("its indices are computed from the image")
    ops, x, dy = step.ops, step.x(), step.dy
    axis = step.attribute("axis", 0) % x.rank
    indices = step.constant(1)
    if indices is None or x.shape[axis].batched:
        step.refuse("it picks images of the batch")
    size = x.shape[axis].size
    flat = [int(i) % size for i in indices.reshape(-1)]
    dy = step.full(range(axis, axis + indices.ndim))
    dy = ops.reshape(dy, (*dy.shape[:axis], Dim(len(flat)), *dy.shape[axis + indices.ndim :]))
    if sorted(flat) == list(range(size)):
        inverse = ops.constant(np.argsort(flat))
        step.give(0, ops.emit("Gather", [dy, inverse], dy.shape, axis=axis))
    elif flat == list(range(flat[0], flat[0] + len(flat))):
        step.give(0, ops.pad(dy, axis, flat[0], size - flat[0] - len(flat)))
    elif len(flat) == 1 or size * len(flat) <= 1 << 20:
        like = Value("", (*dy.shape[:axis], Dim(len(flat)), *dy.shape[axis + 1 :]), x.dtype)
        step.give(
            0, apply_along(ops, ops.expand(dy, like, [axis]), axis, one_hot_rows(flat, size).T)
        )
    else:
        step.refuse(
            f"it gathers {len(flat)} of {size} in no order, which would need a matrix that large"
        )


@rule("ScatterND")
def scatter_nd(step: Step) -> None:
    """y is x with u written over it at places that do not repeat: dx is dy with zeros there, du is dy from
    there."""
    ops = step.ops
    if step.attribute("reduction", "none") != "none":
        step.refuse("it reduces what meets at one place")
    if step.wants(1):
        step.refuse("its indices are computed from the image")
    dy, updates = step.full(), step.x(2)
    if step.wants(0):
        zeros = ops.expand(ops.constant(np.zeros([1] * updates.rank), dy.dtype), updates)
        step.give(0, ops.emit("ScatterND", [dy, step.x(1), zeros], dy.shape))
    if step.wants(2):
        step.give(2, ops.emit("GatherND", [dy, step.x(1)], updates.shape))


@rule("Expand")
def expand(step: Step) -> None:
    """y repeats x along axes of size 1; dx sums over the copies."""
    step.give(0, sum_to(step.ops, step.dy, step.y(), step.x().shape))


@rule("Tile")
def tile(step: Step) -> None:
    """y is x laid r times side by side; dx sums over the copies."""
    ops, x, dx = step.ops, step.x(), step.dy
    for axis in range(x.rank):
        repeats = step.y().shape[axis].size // x.shape[axis].size
        if x.shape[axis].batched or step.y().shape[axis].batched:
            if x.shape[axis] == step.y().shape[axis]:
                continue
            step.refuse("it repeats images of the batch")
        if repeats == 1:
            continue
        if dx.shape[axis] == ONE:
            dx = ops.mul(dx, repeats)
            continue
        parts = ops.reshape(
            dx, (*dx.shape[:axis], Dim(repeats), x.shape[axis], *dx.shape[axis + 1 :])
        )
        dx = ops.reduce("ReduceSum", parts, [axis], keep=False)
    step.give(0, dx)
