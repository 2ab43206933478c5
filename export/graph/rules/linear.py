"""Matrix products: MatMul, Gemm, Einsum.

For Y = A B: dA = dY B^T and dB = A^T dY. Batch axes broadcast, so each is summed back to its operand. An axis
of dY that is under-broadcast stays so unless the product sums over it.
"""

from __future__ import annotations

from export.graph.emit import Ops, Value
from export.graph.registry import Step, rule
from export.graph.rules.broadcasting import sum_to
from export.graph.shapes import ONE


@rule("MatMul")
def matmul(step: Step) -> None:
    ops, a, b = step.ops, step.x(0), step.x(1)
    # A vector takes part as a row (left) or a column (right) that the result does not show.
    rows = ops.reshape(a, (ONE, *a.shape)) if a.rank == 1 else a
    columns = ops.reshape(b, (*b.shape, ONE)) if b.rank == 1 else b
    dy, y = step.dy, step.y()
    if b.rank == 1:
        dy, y = _unsqueeze(ops, dy, dy.rank), _unsqueeze(ops, y, y.rank)
    if a.rank == 1:
        dy, y = _unsqueeze(ops, dy, dy.rank - 1), _unsqueeze(ops, y, y.rank - 1)
    if step.wants(0):
        da = ops.matmul(ops.expand(dy, y, [-1]), ops.swap_last(columns))
        over = Value(y.name, (*y.shape[:-1], rows.shape[-1]), y.dtype)
        step.give(0, _narrow(ops, sum_to(ops, da, over, rows.shape), a))
    if step.wants(1):
        db = ops.matmul(ops.swap_last(rows), ops.expand(dy, y, [-2]))
        over = Value(y.name, (*y.shape[:-2], rows.shape[-1], y.shape[-1]), y.dtype)
        step.give(1, _narrow(ops, sum_to(ops, db, over, columns.shape), b))


@rule("Gemm")
def gemm(step: Step) -> None:
    """Y = alpha A' B' + beta C with A' = A or A^T, B' = B or B^T; C broadcasts."""
    ops = step.ops
    alpha, beta = step.attribute("alpha", 1.0), step.attribute("beta", 1.0)
    left = ops.swap_last(step.x(0)) if step.attribute("transA", 0) else step.x(0)
    right = ops.swap_last(step.x(1)) if step.attribute("transB", 0) else step.x(1)
    if step.wants(0):
        da = ops.mul(ops.matmul(step.full([1]), ops.swap_last(right)), alpha)
        step.give(0, ops.swap_last(da) if step.attribute("transA", 0) else da)
    if step.wants(1):
        db = ops.mul(ops.matmul(ops.swap_last(left), step.full([0])), alpha)
        step.give(1, ops.swap_last(db) if step.attribute("transB", 0) else db)
    if step.wants(2):
        step.give(2, sum_to(ops, ops.mul(step.dy, beta), step.y(), step.x(2).shape))


@rule("Einsum")
def einsum(step: Step) -> None:
    """y[o] = sum over the other letters of a[i] b[j] …; da[i] = sum of dy[o] b[j] …: the letters trade places.

    A letter of an operand that neither the output nor another operand has was summed alone: every term of it
    gets the same gradient, so its axis stays under-broadcast.
    """
    ops = step.ops
    left, arrow, out = step.attribute("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(term)) < len(term) for term in terms):
        step.refuse("only explicit contractions without ellipsis or repeated letters have a rule")
    for i, term in enumerate(terms):
        if not step.wants(i):
            continue
        others = [j for j in range(len(terms)) if j != i]
        available = set(out).union(*(terms[j] for j in others))
        kept = [letter for letter in term if letter in available]
        sources = ",".join([out, *(terms[j] for j in others)])
        sizes = dict(zip(term, step.x(i).shape, strict=True))
        dx = ops.emit(
            "Einsum",
            [step.full(), *(step.x(j) for j in others)],
            tuple(sizes[letter] for letter in kept),
            equation=f"{sources}->{''.join(kept)}",
        )
        step.give(i, ops.reshape(dx, tuple(sizes[s] if s in available else ONE for s in term)))


def _unsqueeze(ops: Ops, x: Value, axis: int) -> Value:
    return ops.reshape(x, (*x.shape[:axis], ONE, *x.shape[axis:]))


def _narrow(ops: Ops, gradient: Value, operand: Value) -> Value:
    """Drop the axis a vector operand took part with."""
    if operand.rank > 1:
        return gradient
    kept = [dim for dim in gradient.shape if dim != ONE] or [ONE]
    return ops.reshape(gradient, tuple(kept))
