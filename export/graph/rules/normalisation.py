"""Normalisations.

Standardising, x^ = (x - mean x) r with r = 1 / sqrt(var x + eps) over some axes, has the gradient dx = r (g -
mean g - x^ mean(g x^)) for g the gradient towards x^. Layer, instance and group normalisation are that
followed by a scale. In inference BatchNormalization is only a scale and a shift.
"""

from __future__ import annotations

import numpy as np

from export.graph.emit import Ops, Value
from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to
from export.graph.rules.matrices import apply_along
from export.graph.shapes import ONE


def standardise(
    ops: Ops, x: Value, g: Value | None, axes: list[int], epsilon: float
) -> tuple[Value, Value]:
    """(x^, dx); with g None, dx is x^ and only the first is meant."""
    centred = ops.sub(x, ops.reduce("ReduceMean", x, axes))
    variance = ops.reduce("ReduceMean", ops.mul(centred, centred), axes)
    r = ops.unary("Reciprocal", ops.unary("Sqrt", ops.add(variance, epsilon)))
    unit = ops.mul(centred, r)
    if g is None:
        return unit, unit
    along = ops.reduce("ReduceMean", ops.mul(g, unit), axes)
    inner = ops.sub(ops.sub(g, ops.reduce("ReduceMean", g, axes)), ops.mul(unit, along))
    return unit, ops.mul(r, inner)


@rule("BatchNormalization")
def batch_normalization(step: Step) -> None:
    """y = s (x - m) / sqrt(v + eps) + b per channel; dx = dy s / sqrt(v + eps)."""
    if step.attribute("training_mode", 0):
        step.refuse(
            "it is in training mode, so no image has an answer of its own; export in eval mode"
        )
    scale, variance = step.constant(1), step.constant(4)
    if scale is None or variance is None:
        step.refuse("it has no scale or variance")
    factor = scale.astype(np.float64) / np.sqrt(
        variance.astype(np.float64) + step.attribute("epsilon", 1e-5)
    )
    shape = (-1, *[1] * (step.x().rank - 2))
    step.give(0, step.ops.mul(step.dy, step.ops.constant(factor.reshape(shape), step.dy.dtype)))


@rule("LayerNormalization")
def layer_normalization(step: Step) -> None:
    """Standardise over the axes from `axis` on, then scale by input 1 and shift by input 2."""
    ops, x = step.ops, step.x()
    first = step.attribute("axis", -1) % x.rank
    axes = list(range(first, x.rank))
    epsilon = step.attribute("epsilon", 1e-5)
    unit, dx = standardise(ops, x, ops.mul(step.dy, step.x(1)), axes, epsilon)
    if step.wants(0):
        step.give(0, dx)
    if step.wants(1):
        step.give(1, sum_to(ops, ops.mul(step.dy, unit), step.y(), step.x(1).shape))
    if step.wants(2):
        step.give(2, sum_to(ops, step.dy, step.y(), step.x(2).shape))


@rule("InstanceNormalization")
def instance_normalization(step: Step) -> None:
    """Standardise over the pixels of each channel, then scale and shift per channel."""
    ops, x = step.ops, step.x()
    if step.wants(1) or step.wants(2):
        step.refuse("its scale or bias is computed from the image")
    scale = ops.reshape(step.x(1), (x.shape[1], *[ONE] * (x.rank - 2)))
    axes = list(range(2, x.rank))
    _, dx = standardise(ops, x, ops.mul(step.dy, scale), axes, step.attribute("epsilon", 1e-5))
    step.give(0, dx)


@rule("LRN")
def lrn(step: Step) -> None:
    """y_c = x_c d_c^-b with d_c = k + a/n sum of x^2 over n channels around c.

    dx_c = dy_c d_c^-b - 2 a b / n x_c sum of dy_j y_j / d_j over the j whose window holds c.
    """
    ops, x = step.ops, step.x()
    size = step.attribute("size", 1)
    alpha, beta = step.attribute("alpha", 1e-4), step.attribute("beta", 0.75)
    channels = x.shape[1].size
    window = np.zeros((channels, channels))
    for c in range(channels):
        window[c, max(0, c - (size - 1) // 2) : c + size // 2 + 1] = 1
    d = ops.add(
        apply_along(ops, ops.mul(x, x), 1, window * (alpha / size)), step.attribute("bias", 1.0)
    )
    dy = step.dy
    shared = apply_along(
        ops, ops.div(ops.mul(dy, step.y()), d), 1, window.T * (2 * alpha * beta / size)
    )
    own = ops.mul(dy, ops.binary("Pow", d, -beta))
    step.give(0, ops.sub(own, ops.mul(x, shared)))


@rule("LpNormalization")
def lp_normalization(step: Step) -> None:
    """y = x / n, n = |x|_p along an axis; dx = (dy - n' sum(dy y)) / n, n' = y (p = 2) or sign x (p = 1)."""
    ops, x, y = step.ops, step.x(), step.y()
    axis = step.attribute("axis", -1) % x.rank
    order = step.attribute("p", 2)
    norm = ops.reduce("ReduceL2" if order == 2 else "ReduceL1", x, [axis])
    norm = ops.where(ops.greater(norm, 0), norm, 1)
    slope = y if order == 2 else ops.unary("Sign", x)
    dy = step.dy
    along = ops.reduce("ReduceSum", ops.mul(dy, y), [axis])
    step.give(0, ops.div(ops.sub(dy, ops.mul(slope, along)), norm))
