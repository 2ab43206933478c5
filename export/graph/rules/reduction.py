"""Reductions over axes. The gradient of a sum is the same for every term: it stays under-broadcast."""

from __future__ import annotations

from math import prod

from export.graph.emit import INT64, Value
from export.graph.registry import Step, rule
from export.graph.shapes import BATCH, ONE, Dim


def _axes(step: Step) -> list[int]:
    """The axes a Reduce* node of opset 18 reduces, non-negative."""
    rank = step.x().rank
    axes = step.integers(1)
    if not axes:
        axes = [] if step.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


def _kept(step: Step, value: Value) -> Value:
    """`value`, a tensor shaped like the output, with the reduced axes present at size 1."""
    if step.attribute("keepdims", 1):
        return value
    axes, dims = _axes(step), iter(value.shape)
    return step.ops.reshape(
        value, tuple(ONE if axis in axes else next(dims) for axis in range(step.x().rank))
    )


@rule("ReduceSum")
def reduce_sum(step: Step) -> None:
    """y = sum x; dx = dy at every term."""
    step.give(0, _kept(step, step.dy))


@rule("ReduceMean")
def reduce_mean(step: Step) -> None:
    """y = (1/n) sum x; dx = dy / n at every term."""
    reduced = [step.x().shape[axis] for axis in _axes(step)]
    if any(dim.batched for dim in reduced):
        step.refuse("it averages over the batch, so no image has a map of its own")
    step.give(0, step.ops.mul(_kept(step, step.dy), 1 / prod(dim.size for dim in reduced)))


@rule("ReduceMax", "ReduceMin")
def reduce_extreme(step: Step) -> None:
    """y = max x; dy goes to the largest term, equal terms share it evenly."""
    ops, x = step.ops, step.x()
    largest = ops.cast(ops.binary("Equal", x, _kept(step, step.y())), x.dtype)
    share = ops.div(_kept(step, step.dy), ops.reduce("ReduceSum", largest, _axes(step)))
    step.give(0, ops.mul(largest, share))


@rule("ReduceL1")
def reduce_l1(step: Step) -> None:
    """y = sum |x|; dx = sign(x) dy."""
    step.give(0, step.ops.mul(step.ops.unary("Sign", step.x()), _kept(step, step.dy)))


@rule("ReduceL2")
def reduce_l2(step: Step) -> None:
    """y = sqrt(sum x^2); dx = dy x / y, and 0 where y = 0."""
    ops, y = step.ops, _kept(step, step.y())
    safe = ops.where(ops.greater(y, 0), y, 1)
    step.give(0, ops.mul(step.x(), ops.div(_kept(step, step.dy), safe)))


@rule("ReduceSumSquare")
def reduce_sum_square(step: Step) -> None:
    """y = sum x^2; dx = 2 x dy."""
    step.give(0, step.ops.mul(step.x(), step.ops.mul(_kept(step, step.dy), 2)))


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(step: Step) -> None:
    """y = log sum exp x; dx = exp(x - y) dy."""
    ops = step.ops
    share = ops.unary("Exp", ops.sub(step.x(), _kept(step, step.y())))
    step.give(0, ops.mul(share, _kept(step, step.dy)))


@rule("ReduceLogSum")
def reduce_log_sum(step: Step) -> None:
    """y = log sum x; dx = dy exp(-y) at every term."""
    ops = step.ops
    one_over = ops.unary("Exp", ops.unary("Neg", _kept(step, step.y())))
    step.give(0, ops.mul(_kept(step, step.dy), one_over))


@rule("GlobalAveragePool")
def global_average_pool(step: Step) -> None:
    """y = mean of x over all pixels; dx = dy / (number of pixels) at every pixel."""
    step.give(0, step.ops.mul(step.dy, 1 / prod(dim.size for dim in step.x().shape[2:])))


@rule("GlobalMaxPool")
def global_max_pool(step: Step) -> None:
    """y = max of x over all pixels; dy goes to the first largest pixel."""
    ops, x = step.ops, step.x()
    pixels = Dim(prod(dim.size for dim in x.shape[2:]))
    flat = ops.reshape(x, (BATCH, x.shape[1], pixels))
    index = ops.emit("ArgMax", [flat], (BATCH, x.shape[1], ONE), INT64, axis=2, keepdims=1)
    first = ops.one_hot(index, pixels.size, 2, x.dtype)
    step.give(0, ops.mul(ops.reshape(first, x.shape), step.dy))


@rule("CumSum")
def cum_sum(step: Step) -> None:
    """y_i = sum of x_j up to i; dx_j = sum of dy_i from j on: the same operator, run the other way."""
    (axis,) = step.integers(1) or [0]
    axis %= step.x().rank
    dy = step.full([axis])
    dx = step.ops.emit(
        "CumSum",
        [dy, step.ops.constant(axis)],
        dy.shape,
        exclusive=step.attribute("exclusive", 0),
        reverse=1 - step.attribute("reverse", 0),
    )
    step.give(0, dx)
