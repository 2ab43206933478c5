"""Writes ONNX nodes and knows the shape of everything it writes.

Rules never touch protobufs: they call `Ops`, which adds nodes of opset 18 that TensorRT's parser takes, shares
equal subexpressions, and never invents a constant that depends on the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from export.graph.errors import UnsupportedNetwork
from export.graph.shapes import BATCH, ONE, Dim, Shape, broadcast, describe, elements, fixed

INT64, BOOL = int(TensorProto.INT64), int(TensorProto.BOOL)
FLOATS = frozenset(
    int(kind)
    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
)


@dataclass(frozen=True)
class Value:
    """A tensor by name, with its shape in terms of N and its ONNX element type."""

    name: str
    shape: Shape
    dtype: int

    @property
    def rank(self) -> int:
        return len(self.shape)


class Ops:
    """A list of nodes under construction. Names start with `prefix/`, so they cannot meet the network's."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._prefix = prefix
        self._seen: dict[tuple[object, ...], Value] = {}
        self._one_hots: dict[str, tuple[Value, int]] = {}
        self._reshaped: dict[str, Value] = {}
        self._scaled: dict[str, tuple[Value, float]] = {}
        self.masked_by: dict[str, str] = {}
        """Gradients that are zero already wherever the named tensor is not positive."""

    # -- the two primitives -------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: Sequence[Value | None],
        shape: Shape,
        dtype: int | None = None,
        **attributes: Any,
    ) -> Value:
        """One node with one output of the given shape; an equal node written before is shared."""
        names = tuple(value.name if value else "" for value in inputs)
        key = (op, names, repr(sorted(attributes.items())))
        if key not in self._seen:
            name = f"{self._prefix}/{len(self.nodes)}_{op}"
            self.nodes.append(helper.make_node(op, names, [name], name=name, **attributes))
            if dtype is None:
                first = inputs[0]
                if first is None:
                    raise ValueError(f"{op} has no first input to take its type from")
                dtype = first.dtype
            self._seen[key] = Value(name, shape, dtype)
        return self._seen[key]

    def constant(self, array: ArrayLike, dtype: int = INT64) -> Value:
        """An initialiser; equal arrays are stored once."""
        data = np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(dtype))
        digest = hashlib.sha256(data.tobytes() + repr((data.shape, dtype)).encode()).hexdigest()
        name = f"{self._prefix}/c_{digest[:16]}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(data), name)
        return Value(name, fixed(data.shape), dtype)

    # -- arithmetic ---------------------------------------------------------------------------

    def unary(self, op: str, x: Value, **attributes: Any) -> Value:
        return self.emit(op, [x], x.shape, **attributes)

    def binary(self, op: str, a: Value | float, b: Value | float) -> Value:
        """`a op b` with broadcasting; numbers become constants of the other side's type."""
        if not isinstance(a, Value):
            if not isinstance(b, Value):
                raise TypeError(f"{op} of two numbers needs no node")
            a = self.constant(a, b.dtype)
        elif not isinstance(b, Value):
            b = self.constant(b, a.dtype)
        dtype = (
            BOOL
            if op in {"Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual", "And"}
            else a.dtype
        )
        return self.emit(op, [a, b], broadcast(a.shape, b.shape), dtype)

    def add(self, a: Value | float, b: Value | float) -> Value:
        return self.binary("Add", a, b)

    def sub(self, a: Value | float, b: Value | float) -> Value:
        return self.binary("Sub", a, b)

    def mul(self, a: Value | float, b: Value | float) -> Value:
        if not isinstance(a, Value) or isinstance(b, Value):
            return self.binary("Mul", a, b)
        source, factor = self._scaled.get(a.name, (a, 1.0))  # two factors become one
        if factor * b == 1:
            return source
        scaled = self.binary("Mul", source, factor * b)
        self._scaled[scaled.name] = (source, factor * b)
        return scaled

    def div(self, a: Value | float, b: Value | float) -> Value:
        return self.binary("Div", a, b)

    def greater(self, a: Value | float, b: Value | float) -> Value:
        return self.binary("Greater", a, b)

    def where(self, condition: Value, a: Value | float, b: Value | float) -> Value:
        like = a if isinstance(a, Value) else b
        if not isinstance(like, Value):
            raise TypeError("Where needs a tensor on one side to know its type")
        then = a if isinstance(a, Value) else self.constant(a, like.dtype)
        other = b if isinstance(b, Value) else self.constant(b, like.dtype)
        shape = broadcast(condition.shape, then.shape, other.shape)
        return self.emit("Where", [condition, then, other], shape, like.dtype)

    def keep(self, x: Value, mask: Value) -> Value:
        """x where the mask is true, else 0: as a product, at half the cost of a selection by Where."""
        return self.mul(x, self.cast(mask, x.dtype))

    def cast(self, x: Value, dtype: int) -> Value:
        return x if x.dtype == dtype else self.emit("Cast", [x], x.shape, dtype, to=dtype)

    # -- reductions ---------------------------------------------------------------------------

    def reduce(self, op: str, x: Value, axes: Sequence[int], *, keep: bool = True) -> Value:
        """ReduceSum, ReduceMean, ReduceMax or ReduceMin; axes of size 1 cost nothing when kept."""
        wanted = sorted(axis % x.rank for axis in axes)
        if keep:
            wanted = [axis for axis in wanted if x.shape[axis] != ONE]
        if not wanted:
            return x
        shape = tuple(
            ONE if axis in wanted else dim
            for axis, dim in enumerate(x.shape)
            if keep or axis not in wanted
        )
        return self.emit(op, [x, self.constant(wanted)], shape, keepdims=int(keep))

    # -- contractions -------------------------------------------------------------------------

    def matmul(self, a: Value, b: Value) -> Value:
        """Batched matrix product of two tensors of rank >= 2. A one-hot row picks instead of multiplying."""
        shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        if (picked := self._one_hots.get(a.name)) and a.rank == b.rank == 2 and picked[1] == 1:
            return self.emit("Gather", [b, picked[0]], shape, b.dtype, axis=0)
        return self.emit("MatMul", [a, b], shape)

    def one_hot(self, index: Value, classes: int, axis: int, dtype: int) -> Value:
        """1 at `index` along `axis` (where `index` has size 1), 0 elsewhere; Equal and Cast, no OneHot node."""
        shape = [1] * index.rank
        shape[axis] = classes
        mask = self.binary("Equal", self.constant(np.arange(classes).reshape(shape)), index)
        hot = self.cast(mask, dtype)
        if index.rank == 2:
            self._one_hots[hot.name] = (self.reshape(index, index.shape[:1]), axis)
        return hot

    # -- layout -------------------------------------------------------------------------------

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        moved = [axis for axis in perm if x.shape[axis] != ONE]
        if moved == sorted(moved):  # only axes of size 1 change places
            return self.reshape(x, tuple(x.shape[axis] for axis in perm))
        return self.emit("Transpose", [x], tuple(x.shape[axis] for axis in perm), perm=list(perm))

    def swap_last(self, x: Value) -> Value:
        """The matrix transpose, for any number of leading axes."""
        return self.transpose(x, [*range(x.rank - 2), x.rank - 1, x.rank - 2])

    def reshape(self, x: Value, shape: Shape) -> Value:
        x = self._reshaped.get(x.name, x)  # a reshape of a reshape is one
        if x.shape == shape:
            return x
        if elements(x.shape) != elements(shape):
            raise ValueError(f"cannot reshape {describe(x.shape)} to {describe(shape)}")
        if sum(dim.batched for dim in shape) > 1:
            raise UnsupportedNetwork(
                f"tensor {x.name!r} would need the shape {describe(shape)}, which depends on the batch "
                "size twice; tap a tensor after it"
            )
        sizes = [-1 if dim.batched else dim.size for dim in shape]
        reshaped = self.emit("Reshape", [x, self.constant(sizes)], shape)
        self._reshaped[reshaped.name] = x
        return reshaped

    def expand(self, x: Value, like: Value, axes: Sequence[int] | None = None) -> Value:
        """Repeat `x` along `axes` (default: all) wherever it has size 1 and `like` has more."""
        chosen = range(x.rank) if axes is None else [axis % x.rank for axis in axes]
        grown = [axis for axis in chosen if x.shape[axis] == ONE != like.shape[axis]]
        if not grown:
            return x
        shape = tuple(like.shape[a] if a in grown else dim for a, dim in enumerate(x.shape))
        if not any(like.shape[axis].batched for axis in grown):
            sizes = [like.shape[a].size if a in grown else 1 for a in range(x.rank)]
            return self.emit("Expand", [x, self.constant(sizes)], shape)
        # Only the running graph knows N: take it from the tensor that has it.
        target = self.emit("Shape", [like], fixed([like.rank]), INT64)
        if len(grown) < sum(dim != ONE for dim in like.shape):
            mask = self.constant([a in grown for a in range(x.rank)], BOOL)
            target = self.emit("Where", [mask, target, self.constant([1])], fixed([x.rank]), INT64)
        return self.emit("Expand", [x, target], shape)

    def slice(self, x: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
        """`x[start:end:step]` along one axis of constant size, 0 <= start < end."""
        size = x.shape[axis].size
        if (start, step) == (0, 1) and end >= size:
            return x
        length = len(range(start, min(end, size), step))
        shape = (*x.shape[:axis], Dim(length), *x.shape[axis + 1 :])
        bounds = [self.constant([number]) for number in (start, end, axis, step)]
        return self.emit("Slice", [x, *bounds], shape)

    def reverse(self, x: Value, axes: Sequence[int]) -> Value:
        """Flip along axes of constant size."""
        axes = [axis for axis in axes if x.shape[axis] != ONE]
        if not axes:
            return x
        ends = [self.constant([number] * len(axes)) for number in (-1, -(2**31))]
        steps = self.constant([-1] * len(axes))
        return self.emit("Slice", [x, *ends, self.constant(list(axes)), steps], x.shape)

    def pad(self, x: Value, axis: int, before: int, after: int) -> Value:
        """Zeros before and after along one axis of constant size."""
        if before == after == 0:
            return x
        pads = [0] * (2 * x.rank)
        pads[axis], pads[axis + x.rank] = before, after
        shape = (*x.shape[:axis], Dim(x.shape[axis].size + before + after), *x.shape[axis + 1 :])
        return self.emit("Pad", [x, self.constant(pads), self.constant(0, x.dtype)], shape)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        if len(parts) == 1:
            return parts[0]
        sizes = [part.shape[axis] for part in parts]
        total = Dim(sum(dim.size for dim in sizes), sizes[0].batched)
        shape = (*parts[0].shape[:axis], total, *parts[0].shape[axis + 1 :])
        return self.emit("Concat", parts, shape, axis=axis)


__all__ = ["BATCH", "BOOL", "FLOATS", "INT64", "Ops", "Value"]
