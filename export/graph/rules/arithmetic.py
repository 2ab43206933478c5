"""Arithmetic with broadcasting: each operand's gradient is summed back over the axes it was repeated on."""

from __future__ import annotations

from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to


@rule("Add", "Sum")
def add(step: Step) -> None:
    """y = a + b + …; each operand gets dy."""
    for i in range(len(step.node.input)):
        if step.wants(i):
            step.give(i, sum_to(step.ops, step.dy, step.y(), step.x(i).shape))


@rule("Sub")
def sub(step: Step) -> None:
    """y = a - b; da = dy, db = -dy."""
    if step.wants(0):
        step.give(0, sum_to(step.ops, step.dy, step.y(), step.x(0).shape))
    if step.wants(1):
        negative = step.ops.unary("Neg", step.dy)
        step.give(1, sum_to(step.ops, negative, step.y(), step.x(1).shape))


@rule("Mul")
def mul(step: Step) -> None:
    """y = a b; da = dy b, db = dy a."""
    for i in (0, 1):
        if step.wants(i):
            product = step.ops.mul(step.dy, step.x(1 - i))
            step.give(i, sum_to(step.ops, product, step.y(), step.x(i).shape))
