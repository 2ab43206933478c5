"""Element-wise non-linearities: y = f(x), dx = f'(x) dy.

At a kink any subgradient is right. The rules take 0 for Relu at 0 and for Clip at its bounds, and the negative
slope for LeakyRelu and its kin, as torch does for its modules.
"""

from __future__ import annotations

from math import pi, sqrt

from export.graph.emit import BOOL, Value
from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to


@rule("Relu")
def relu(step: Step) -> None:
    """y = max(x, 0); dx = dy where y > 0."""
    ops, dy = step.ops, step.dy
    masked = ops.masked_by.get(dy.name) == step.y().name
    step.give(0, dy if masked else ops.keep(dy, ops.greater(step.y(), 0)))


@rule("ThresholdedRelu")
def thresholded_relu(step: Step) -> None:
    """y = x where x > alpha, else 0; dx = dy where x > alpha."""
    above = step.ops.greater(step.x(), step.attribute("alpha", 1.0))
    step.give(0, step.ops.keep(step.dy, above))


@rule("Clip")
def clip(step: Step) -> None:
    """y = min(max(x, low), high); dx = dy where low < y < high."""
    ops, y = step.ops, step.y()
    inside: list[Value | None] = []
    if step.has(1):
        inside.append(ops.greater(y, step.x(1)))
    if step.has(2):
        inside.append(ops.binary("Less", y, step.x(2)))
    mask = inside[0] if inside else None
    if len(inside) == 2:
        mask = ops.emit("And", inside, y.shape, BOOL)
    step.give(0, ops.keep(step.dy, mask) if mask else step.dy)


@rule("LeakyRelu", "PRelu")
def leaky_relu(step: Step) -> None:
    """y = x where x > 0, else s x; dx = dy or s dy, and ds = x dy where x <= 0."""
    ops, x, dy = step.ops, step.x(), step.dy
    positive = ops.greater(x, 0)
    slope = step.x(1) if step.node.op_type == "PRelu" else step.attribute("alpha", 0.01)
    if step.wants(0):
        step.give(0, ops.where(positive, dy, ops.mul(dy, slope)))
    if step.wants(1):
        step.give(1, sum_to(ops, ops.where(positive, 0, ops.mul(dy, x)), step.y(), step.x(1).shape))


@rule("Elu", "Selu", "Celu")
def elu(step: Step) -> None:
    """y = g x where x > 0, else g a (exp(x / b) - 1); below, dy/dx = (y + g a) / b.

    Elu: g = b = 1. Selu: b = 1. Celu: g = 1, b = a.
    """
    ops, kind = step.ops, step.node.op_type
    gain = step.attribute("gamma", 1.0507009873554805) if kind == "Selu" else 1.0
    alpha = step.attribute("alpha", 1.6732632423543772 if kind == "Selu" else 1.0)
    below = ops.add(step.y(), gain * alpha)
    if kind == "Celu":
        below = ops.div(below, alpha)
    step.give(0, ops.mul(step.dy, ops.where(ops.greater(step.x(), 0), gain, below)))


@rule("HardSigmoid")
def hard_sigmoid(step: Step) -> None:
    """y = min(max(a x + b, 0), 1); dx = a dy where 0 < y < 1."""
    ops, y = step.ops, step.y()
    inside = ops.emit("And", [ops.greater(y, 0), ops.binary("Less", y, 1)], y.shape, BOOL)
    step.give(0, ops.keep(ops.mul(step.dy, step.attribute("alpha", 0.2)), inside))


@rule("HardSwish")
def hard_swish(step: Step) -> None:
    """y = x h with h = min(max(x / 6 + 1/2, 0), 1); dy/dx = h + x / 6 where |x| < 3, else h."""
    ops, x = step.ops, step.x()
    gate = ops.unary("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    inside = ops.binary("Less", ops.unary("Abs", x), 3)
    slope = ops.add(gate, ops.mul(ops.keep(x, inside), 1 / 6))
    step.give(0, ops.mul(step.dy, slope))


@rule("Mish")
def mish(step: Step) -> None:
    """y = x t with t = tanh(softplus(x)); dy/dx = t + x sigmoid(x) (1 - t^2)."""
    ops, x = step.ops, step.x()
    t = ops.unary("Tanh", ops.unary("Softplus", x))
    rise = ops.mul(ops.mul(x, ops.unary("Sigmoid", x)), ops.sub(1, ops.mul(t, t)))
    step.give(0, ops.mul(step.dy, ops.add(t, rise)))


@rule("Sigmoid")
def sigmoid(step: Step) -> None:
    """dy/dx = y (1 - y)."""
    y = step.y()
    step.give(0, step.ops.mul(step.dy, step.ops.mul(y, step.ops.sub(1, y))))


@rule("Tanh")
def tanh(step: Step) -> None:
    """dy/dx = 1 - y^2."""
    y = step.y()
    step.give(0, step.ops.mul(step.dy, step.ops.sub(1, step.ops.mul(y, y))))


@rule("Erf")
def erf(step: Step) -> None:
    """dy/dx = 2 / sqrt(pi) exp(-x^2)."""
    ops, x = step.ops, step.x()
    bell = ops.unary("Exp", ops.unary("Neg", ops.mul(x, x)))
    step.give(0, ops.mul(step.dy, ops.mul(bell, 2 / sqrt(pi))))


@rule("Softplus")
def softplus(step: Step) -> None:
    """y = log(1 + exp x); dy/dx = sigmoid(x)."""
    step.give(0, step.ops.mul(step.dy, step.ops.unary("Sigmoid", step.x())))


@rule("Softsign")
def softsign(step: Step) -> None:
    """y = x / (1 + |x|); dy/dx = 1 / (1 + |x|)^2."""
    denominator = step.ops.add(step.ops.unary("Abs", step.x()), 1)
    step.give(0, step.ops.div(step.dy, step.ops.mul(denominator, denominator)))


@rule("Softmax")
def softmax(step: Step) -> None:
    """dx = y (dy - sum(y dy)), the sum over the softmax's axis."""
    ops, y = step.ops, step.y()
    axis = step.attribute("axis", -1) % y.rank
    dy = step.full([axis])
    mean = ops.reduce("ReduceSum", ops.mul(y, dy), [axis])
    step.give(0, ops.mul(y, ops.sub(dy, mean)))


@rule("LogSoftmax")
def log_softmax(step: Step) -> None:
    """dx = dy - exp(y) sum(dy), the sum over the softmax's axis."""
    ops, y = step.ops, step.y()
    axis = step.attribute("axis", -1) % y.rank
    dy = step.full([axis])
    total = ops.reduce("ReduceSum", dy, [axis])
    step.give(0, ops.sub(dy, ops.mul(ops.unary("Exp", y), total)))
