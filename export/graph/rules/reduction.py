"""Reductions over axes. The gradient of a sum is the same for every term: it stays under-broadcast."""

from __future__ import annotations

from export.graph.emit import Value
from export.graph.registry import Step, rule
from export.graph.shapes import ONE


def reduced_axes(step: Step) -> list[int]:
    """The axes a Reduce* node of opset 18 reduces, non-negative."""
    rank = step.x().rank
    axes = step.integers(1)
    if not axes:
        axes = [] if step.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


def kept(step: Step, value: Value, axes: list[int]) -> Value:
    """`value`, a tensor shaped like the output, with the reduced axes present at size 1."""
    if step.attribute("keepdims", 1):
        return value
    dims = iter(value.shape)
    shape = tuple(ONE if axis in axes else next(dims) for axis in range(step.x().rank))
    return step.ops.reshape(value, shape)


@rule("ReduceSum")
def reduce_sum(step: Step) -> None:
    """y = sum x, so dx = dy at every term."""
    step.give(0, kept(step, step.dy, reduced_axes(step)))


@rule("ReduceMean")
def reduce_mean(step: Step) -> None:
    """y = (1/n) sum x, so dx = dy / n at every term."""
    axes = reduced_axes(step)
    count = 1
    for axis in axes:
        if step.x().shape[axis].batched:
            step.refuse("it averages over the batch, so the images are not independent")
        count *= step.x().shape[axis].size
    step.give(0, step.ops.mul(kept(step, step.dy, axes), 1 / count))


@rule("GlobalAveragePool")
def global_average_pool(step: Step) -> None:
    """y = mean of x over all spatial axes, so dx = dy / (number of pixels) at every pixel."""
    count = 1
    for dim in step.x().shape[2:]:
        count *= dim.size
    step.give(0, step.ops.mul(step.dy, 1 / count))
