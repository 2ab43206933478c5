"""Linear operators that act on each spatial axis alone, as one constant matrix per axis.

Average pooling, resizing and padding are y = A_h x A_w^T, whatever their coordinate mode. Their gradient is
dx = A_h^T dy A_w: two matrix products with constants, and no operator that a runtime could read another way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.graph.emit import Ops, Value
from export.graph.shapes import ONE, Dim

Matrix = NDArray[np.float64]


def apply_along(ops: Ops, x: Value, axis: int, matrix: Matrix) -> Value:
    """y[…, i, …] = sum_j matrix[i, j] x[…, j, …] along one axis of constant size.

    On an under-broadcast axis every x[j] is the same, so y is x times the row sums: one number if they agree.
    """
    rows, columns = matrix.shape
    if x.shape[axis] == ONE:
        sums = matrix.sum(1)
        if np.allclose(sums, sums[0], rtol=1e-12, atol=0):
            return ops.mul(x, float(sums[0]))
        return ops.mul(x, ops.constant(sums.reshape(-1, *[1] * (x.rank - axis - 1)), x.dtype))
    if rows == columns and np.array_equal(matrix, np.eye(rows)):
        return x
    if axis == x.rank - 2:
        product = ops.matmul(ops.constant(matrix, x.dtype), x)
        return Value(product.name, (*x.shape[:axis], Dim(rows), x.shape[-1]), x.dtype)
    last = [*(a for a in range(x.rank) if a != axis), axis]
    back = [last.index(a) for a in range(x.rank)]
    product = ops.matmul(ops.transpose(x, last), ops.constant(matrix.T, x.dtype))
    return ops.transpose(product, back)


def one_hot_rows(indices: list[int], columns: int) -> Matrix:
    """The matrix of y[i] = x[indices[i]]; a negative index is a zero row."""
    matrix = np.zeros((len(indices), columns))
    for row, column in enumerate(indices):
        if column >= 0:
            matrix[row, column] = 1
    return matrix


def block_size(matrix: Matrix) -> int | None:
    """b if the matrix copies (or averages) every input to (from) b neighbours in a row; None otherwise.

    True for nearest resizing by a whole factor and for pooling windows that tile the axis: y[i] = c x[i // b].
    """
    rows, columns = matrix.shape
    if rows % columns or rows == columns:
        return None
    block = rows // columns
    pattern = np.kron(np.eye(columns), np.ones((block, 1)))
    return (
        block
        if np.array_equal(matrix != 0, pattern != 0) and np.ptp(matrix[matrix != 0]) == 0
        else None
    )
