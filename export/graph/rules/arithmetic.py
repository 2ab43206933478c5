"""Arithmetic with broadcasting: each operand's gradient is summed back over the axes it was repeated on."""

from __future__ import annotations

from export.graph.emit import FLOATS, Value
from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to


def _give(step: Step, i: int, gradient: Value) -> None:
    """Hand back `gradient`, which has the axes of the output, to operand i."""
    step.give(i, sum_to(step.ops, gradient, step.y(), step.x(i).shape))


@rule("Add", "Sum")
def add(step: Step) -> None:
    """y = a + b + …; each operand gets dy."""
    for i in range(len(step.node.input)):
        if step.wants(i):
            _give(step, i, step.dy)


@rule("Mean")
def mean(step: Step) -> None:
    """y = (a + b + …) / n; each operand gets dy / n."""
    share = step.ops.mul(step.dy, 1 / len(step.node.input))
    for i in range(len(step.node.input)):
        if step.wants(i):
            _give(step, i, share)


@rule("Sub")
def sub(step: Step) -> None:
    """y = a - b; da = dy, db = -dy."""
    if step.wants(0):
        _give(step, 0, step.dy)
    if step.wants(1):
        _give(step, 1, step.ops.unary("Neg", step.dy))


@rule("Mul")
def mul(step: Step) -> None:
    """y = a b; da = dy b, db = dy a."""
    for i in (0, 1):
        if step.wants(i):
            _give(step, i, step.ops.mul(step.dy, step.x(1 - i)))


@rule("Div")
def div(step: Step) -> None:
    """y = a / b; da = dy / b, db = -dy y / b."""
    ops, b = step.ops, step.x(1)
    share = ops.div(step.dy, b)
    if step.wants(0):
        _give(step, 0, share)
    if step.wants(1):
        _give(step, 1, ops.unary("Neg", ops.mul(share, step.y())))


@rule("Pow")
def power(step: Step) -> None:
    """y = a^b; da = dy b a^(b-1), db = dy y log(a)."""
    ops, a, b, dy = step.ops, step.x(0), step.x(1), step.dy
    if step.wants(0):
        exponent = step.network.constant(b.name)
        if exponent is not None and exponent.size == 1:
            number = float(exponent.reshape(-1)[0].astype(float))
            below = a if number == 2 else ops.binary("Pow", a, number - 1)
            slope = ops.mul(below, number) if number != 1 else None
        else:
            like = ops.cast(b, a.dtype)
            slope = ops.mul(ops.binary("Pow", a, ops.sub(like, 1)), like)
        _give(step, 0, ops.mul(dy, slope) if slope else dy)
    if step.wants(1):
        _give(step, 1, ops.mul(dy, ops.mul(step.y(), ops.unary("Log", a))))


@rule("Max", "Min")
def extreme(step: Step) -> None:
    """y = max(a, b, …): dy goes to the operand that is the largest; equal operands share it evenly."""
    ops, y = step.ops, step.y()
    count = len(step.node.input)
    if count == 1:
        step.give(0, step.dy)
        return
    chosen = [ops.cast(ops.binary("Equal", step.x(i), y), y.dtype) for i in range(count)]
    ties = chosen[0]
    for mask in chosen[1:]:
        ties = ops.add(ties, mask)
    share = ops.div(step.dy, ties)
    for i in range(count):
        if step.wants(i):
            _give(step, i, ops.mul(share, chosen[i]))


@rule("Where")
def where(step: Step) -> None:
    """y = a where c, else b; da = dy where c, db = dy where not c."""
    ops, condition = step.ops, step.x(0)
    if step.wants(1):
        _give(step, 1, ops.where(condition, step.dy, 0))
    if step.wants(2):
        _give(step, 2, ops.where(condition, 0, step.dy))


@rule("Neg")
def neg(step: Step) -> None:
    """dy/dx = -1."""
    step.give(0, step.ops.unary("Neg", step.dy))


@rule("Abs")
def absolute(step: Step) -> None:
    """dy/dx = sign(x)."""
    step.give(0, step.ops.mul(step.dy, step.ops.unary("Sign", step.x())))


@rule("Sqrt")
def sqrt(step: Step) -> None:
    """dy/dx = 1 / (2 y)."""
    step.give(0, step.ops.div(step.ops.mul(step.dy, 0.5), step.y()))


@rule("Reciprocal")
def reciprocal(step: Step) -> None:
    """dy/dx = -y^2."""
    y = step.y()
    step.give(0, step.ops.unary("Neg", step.ops.mul(step.dy, step.ops.mul(y, y))))


@rule("Exp")
def exp(step: Step) -> None:
    """dy/dx = y."""
    step.give(0, step.ops.mul(step.dy, step.y()))


@rule("Log")
def log(step: Step) -> None:
    """dy/dx = 1 / x."""
    step.give(0, step.ops.div(step.dy, step.x()))


@rule("Sin")
def sin(step: Step) -> None:
    """dy/dx = cos(x)."""
    step.give(0, step.ops.mul(step.dy, step.ops.unary("Cos", step.x())))


@rule("Cos")
def cos(step: Step) -> None:
    """dy/dx = -sin(x)."""
    step.give(0, step.ops.unary("Neg", step.ops.mul(step.dy, step.ops.unary("Sin", step.x()))))


@rule("Floor", "Ceil", "Round", "Sign")
def piecewise_constant(step: Step) -> None:
    """dy/dx = 0 wherever it exists: nothing to hand back."""


@rule("Cast", "CastLike")
def cast(step: Step) -> None:
    """The same numbers in another floating-point type; a cast to an integer type has derivative zero."""
    if step.x().dtype in FLOATS:
        step.give(0, step.ops.cast(step.dy, step.x().dtype))
