"""Element-wise non-linearities: y = f(x), dx = f'(x) dy.

At a kink any subgradient is right; the rules take the one of torch (0 for Relu at 0 and for Clip at its bounds,
the negative slope for LeakyRelu and its kin).
"""

from __future__ import annotations

from export.graph.emit import BOOL
from export.graph.registry import Step, rule
from export.graph.shapes import broadcast


@rule("Relu")
def relu(step: Step) -> None:
    """y = max(x, 0); dx = dy where y > 0."""
    step.give(0, step.ops.where(step.ops.greater(step.y(), 0), step.dy, 0))


@rule("Clip")
def clip(step: Step) -> None:
    """y = min(max(x, low), high); dx = dy where low < y < high."""
    ops, y = step.ops, step.y()
    inside = []
    if step.has(1):
        inside.append(ops.greater(y, step.x(1)))
    if step.has(2):
        inside.append(ops.binary("Less", y, step.x(2)))
    if not inside:
        step.give(0, step.dy)
        return
    mask = inside[0]
    if len(inside) == 2:
        mask = ops.emit("And", inside, broadcast(*(part.shape for part in inside)), BOOL)
    step.give(0, ops.where(mask, step.dy, 0))
