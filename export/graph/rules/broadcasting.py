"""What every broadcasting operator needs: summing a gradient back over the axes its operand was repeated on."""

from __future__ import annotations

from export.graph.emit import Ops, Value
from export.graph.shapes import ONE, Shape


def sum_to(ops: Ops, gradient: Value, over: Value, shape: Shape) -> Value:
    """Sum `gradient`, a gradient of the tensor `over`, down to an operand of the given shape.

    With y = broadcast(a), dL/da = sum of dL/dy over every axis where a has size 1 (or no axis) and y has more.
    An axis on which the gradient is under-broadcast contributes its size as a factor instead of a sum.
    """
    missing = over.rank - len(shape)
    summed = [
        axis
        for axis, dim in enumerate(over.shape)
        if dim != ONE and (axis < missing or shape[axis - missing] == ONE)
    ]
    # A batched axis has no constant size to multiply by: bring it to its own size and sum.
    gradient = ops.expand(gradient, over, [axis for axis in summed if over.shape[axis].batched])
    factor = 1
    for axis in summed:
        if gradient.shape[axis] == ONE:
            factor *= over.shape[axis].size
    gradient = ops.reduce("ReduceSum", gradient, summed)
    gradient = ops.mul(gradient, factor)
    return ops.reshape(gradient, gradient.shape[missing:])
