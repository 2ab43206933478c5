"""Sliding-window pooling.

AveragePool is linear along each axis: y = A_h x A_w^T with rows that hold 1/count over one window. MaxPool
hands dy to the first largest pixel of its window. With x_k the input seen at offset k of every window (a
strided slice), the pixel at offset k wins where x_k = y and no earlier one did; its share goes back to where
it came from by the transposed slice. No operator counts ties twice, and none needs MaxPool's Indices.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from export.graph.emit import Ops, Value
from export.graph.registry import Step, rule
from export.graph.rules.convolution import Geometry, geometry
from export.graph.rules.matrices import Matrix
from export.graph.rules.resize import spread
from export.graph.shapes import ONE, Dim


@rule("AveragePool")
def average_pool(step: Step) -> None:
    """dx = A_h^T dy A_w."""
    window = geometry(step, step.attribute("kernel_shape", [0]))
    include = bool(step.attribute("count_include_pad", 0))
    dx = step.dy
    for axis in range(len(window.kernel)):
        size, out = step.x().shape[2 + axis].size, step.y().shape[2 + axis].size
        dx = spread(step.ops, dx, 2 + axis, _average_matrix(window, axis, size, out, include))
    step.give(0, dx)


def _average_matrix(window: Geometry, axis: int, size: int, out: int, include_pad: bool) -> Matrix:
    """[out, size]: 1/count for the pixels under each window; padding counts only if `include_pad`."""
    matrix = np.zeros((out, size))
    for row in range(out):
        start = row * window.strides[axis] - window.begin[axis]
        pixels = [start + k * window.dilations[axis] for k in range(window.kernel[axis])]
        inside = [pixel for pixel in pixels if 0 <= pixel < size]
        counted = [pixel for pixel in pixels if pixel < size + window.end[axis]]
        matrix[row, inside] = 1 / (len(counted) if include_pad else max(1, len(inside)))
    return matrix


@rule("MaxPool")
def max_pool(step: Step) -> None:
    ops, x, y = step.ops, step.x(), step.y()
    window = geometry(step, step.attribute("kernel_shape", [0]))
    if step.attribute("storage_order", 0):
        step.refuse("column-major storage_order has no rule")
    axes = range(2, x.rank)
    offsets = list(product(*(range(k) for k in window.kernel)))
    left = step.dy  # what of dy no earlier offset has taken
    maker = step.network.producer.get(x.name)
    # Where the gradient goes on through a Relu, its mask can be applied at the smaller of the two
    # resolutions; where it is asked for right behind the Relu, there is no mask.
    after_relu = maker is not None and maker.op_type == "Relu" and x.name not in step.wanted
    if after_relu:
        left = ops.keep(left, ops.greater(y, 0))
    phases: dict[tuple[int, ...], Value] = {}
    padded = _pad_with_lowest(step, window)
    for number, offset in enumerate(offsets):
        seen = padded
        for axis, k in zip(axes, offset, strict=True):
            start = k * window.dilations[axis - 2]
            stride, out = window.strides[axis - 2], y.shape[axis].size
            seen = ops.slice(seen, axis, start, start + (out - 1) * stride + 1, stride)
        wins = ops.binary("Equal", seen, y)
        taken = ops.keep(left, wins)
        if number + 1 < len(offsets):
            left = ops.sub(left, taken)  # to the bit: a number minus itself, or minus zero
        _add_shifted(ops, phases, taken, offset, window)
    dx = _joined_phases(step, window, phases)
    if after_relu:
        ops.masked_by[dx.name] = x.name
    step.give(0, dx)


def _pad_with_lowest(step: Step, window: Geometry) -> Value:
    """x with borders that win nowhere, wide enough for every window (ceil mode may reach past the pads)."""
    x, y = step.x(), step.y()
    pads = [0] * (2 * x.rank)
    shape = list(x.shape)
    for axis in range(2, x.rank):
        i = axis - 2
        reach = (y.shape[axis].size - 1) * window.strides[i] + window.reach(i)
        pads[axis] = window.begin[i]
        pads[axis + x.rank] = max(0, reach - window.begin[i] - x.shape[axis].size)
        shape[axis] = Dim(x.shape[axis].size + pads[axis] + pads[axis + x.rank])
    if not any(pads):
        return x
    dtype = np.float16 if x.dtype == 10 else np.float32
    lowest = step.ops.constant(np.finfo(dtype).min, x.dtype)
    return step.ops.emit("Pad", [x, step.ops.constant(pads), lowest], tuple(shape))


def _add_shifted(
    ops: Ops,
    phases: dict[tuple[int, ...], Value],
    taken: Value,
    offset: tuple[int, ...],
    window: Geometry,
) -> None:
    """Window o at offset k covers pixel s o + d k: phase (d k mod s), shifted by (d k div s)."""
    rank, spatial = taken.rank, len(offset)
    reach = [k * d for k, d in zip(offset, window.dilations, strict=True)]
    phase = tuple(r % s for r, s in zip(reach, window.strides, strict=True))
    for i in range(spatial):
        longest = (window.reach(i) - 1 - phase[i]) // window.strides[i]
        shift = reach[i] // window.strides[i]
        taken = ops.pad(taken, rank - spatial + i, shift, longest - shift)
    phases[phase] = ops.add(phases[phase], taken) if phase in phases else taken


def _joined_phases(step: Step, window: Geometry, phases: dict[tuple[int, ...], Value]) -> Value:
    """Interleave the phases into one map, and cut the padding off.

    A transposed convolution per channel, whose kernel holds a single one for each phase, puts every number in
    its place; runtimes do that several times faster than a transposition of axes as short as a stride.
    """
    ops, x = step.ops, step.x()
    strides = window.strides
    spatial = len(strides)
    longest = [max(part.shape[2 + i].size for part in phases.values()) for i in range(spatial)]
    parts = []
    for part in phases.values():
        for i in range(spatial):
            part = ops.pad(part, 2 + i, 0, longest[i] - part.shape[2 + i].size)
        parts.append(ops.reshape(part, (*part.shape[:2], ONE, *part.shape[2:])))
    count, channels = len(parts), x.shape[1].size
    stacked = ops.concat(parts, 2)
    dx = ops.reshape(stacked, (x.shape[0], Dim(channels * count), *map(Dim, longest)))
    sizes = [n * s for n, s in zip(longest, strides, strict=True)]
    wanted = [x.shape[2 + i].size for i in range(spatial)]
    spare = [
        max(0, have - begin - size)
        for have, begin, size in zip(sizes, window.begin, wanted, strict=True)
    ]
    if any(s > 1 for s in strides):
        places = [np.ravel_multi_index(phase, strides) for phase in phases]
        kernel = np.eye(int(np.prod(strides)))[places].reshape(count, 1, *strides)
        left = [h - b - e for h, b, e in zip(sizes, window.begin, spare, strict=True)]
        dx = ops.emit(
            "ConvTranspose",
            [dx, ops.constant(np.concatenate([kernel] * channels), x.dtype)],
            (*x.shape[:2], *map(Dim, left)),
            strides=strides,
            pads=[*window.begin, *spare],
            group=channels,
        )
    else:
        for i in range(spatial):
            dx = ops.slice(dx, 2 + i, window.begin[i], sizes[i] - spare[i])
    for i in range(spatial):
        dx = ops.pad(dx, 2 + i, 0, wanted[i] - dx.shape[2 + i].size)
    return dx
