"""Convolutions. A convolution's input gradient is the transposed convolution with the same weights.

Along one axis y[o] = sum_k w[k] x[s o + d k - p], so dx[i] = sum over (o, k) with s o + d k - p = i of w[k]
dy[o]: a ConvTranspose with the same stride, dilation, groups and pads. It yields (O - 1) s + (K - 1) d + 1 - p
- p' values, up to s - 1 fewer than x has where the stride left some over; `output_padding` adds exactly those.
With stride 1 that is again a convolution, of dy with the weights flipped and their channels exchanged, which
runtimes run much faster, except towards the few channels of an image: they compute channels in blocks. The
exchange is written as nodes on the stored weights: a runtime folds them when it loads the file, and the file
holds no second copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.graph.emit import Ops, Value
from export.graph.registry import Step, rule
from export.graph.shapes import Dim

_FEW = 8  # channels in a block of the runtimes' convolutions


@dataclass(frozen=True)
class Geometry:
    """Strides, dilations, pads and kernel of a sliding window, per spatial axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]

    def reach(self, axis: int) -> int:
        """Pixels one window spans."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1


def geometry(step: Step, kernel: list[int]) -> Geometry:
    """The window of a Conv or pooling node, with `auto_pad` resolved from the known sizes."""
    rank = len(kernel)
    strides = step.attribute("strides", [1] * rank)
    dilations = step.attribute("dilations", [1] * rank)
    pads = step.attribute("pads", [0] * (2 * rank))
    begin, end = pads[:rank], pads[rank:]
    auto = step.attribute("auto_pad", "NOTSET")
    if auto in {"SAME_UPPER", "SAME_LOWER"}:
        for axis in range(rank):
            size, out = step.x().shape[2 + axis].size, step.y().shape[2 + axis].size
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max(0, (out - 1) * strides[axis] + reach - size)
            small = total // 2
            upper = auto == "SAME_UPPER"
            begin[axis], end[axis] = (small, total - small) if upper else (total - small, small)
    elif auto == "VALID":
        begin, end = [0] * rank, [0] * rank
    return Geometry(kernel, strides, dilations, begin, end)


@rule("Conv")
def conv(step: Step) -> None:
    """dx = ConvTranspose(dy, w), or for stride 1 Conv(dy, exchanged w)."""
    if step.wants(1) or step.wants(2):
        step.refuse("its weights or bias are computed from the image")
    ops, x, w = step.ops, step.x(0), step.x(1)
    window = geometry(step, [dim.size for dim in w.shape[2:]])
    group = step.attribute("group", 1)
    flipped = [
        (window.reach(axis) - 1 - window.begin[axis], window.reach(axis) - 1 - window.end[axis])
        for axis in range(len(window.kernel))
    ]
    plain = all(s == 1 for s in window.strides) and all(min(pair) >= 0 for pair in flipped)
    if plain and x.shape[1].size >= _FEW:
        dx = ops.emit(
            "Conv",
            [step.full(), _exchanged(ops, w, group)],
            x.shape,
            kernel_shape=window.kernel,
            dilations=window.dilations,
            pads=[pair[side] for side in (0, 1) for pair in flipped],
            group=group,
        )
    else:
        dx = _transposed(step, window, group)
    step.give(0, dx)


def _exchanged(ops: Ops, w: Value, group: int) -> Value:
    """[g O, I, k…] -> [g I, O, k…] with the kernel flipped, for weights of g groups."""
    outs, ins, kernel = Dim(w.shape[0].size // group), w.shape[1], w.shape[2:]
    w = ops.reverse(w, list(range(2, w.rank)))
    if group == 1:
        return ops.transpose(w, [1, 0, *range(2, w.rank)])
    grouped = ops.reshape(w, (Dim(group), outs, ins, *kernel))
    swapped = ops.transpose(grouped, [0, 2, 1, *range(3, grouped.rank)])
    return ops.reshape(swapped, (Dim(group * ins.size), outs, *kernel))


def _transposed(step: Step, window: Geometry, group: int) -> Value:
    sizes = [dim.size for dim in step.x().shape[2:]]
    outs = [dim.size for dim in step.y().shape[2:]]
    left_over = [
        size - ((out - 1) * stride + window.reach(axis) - window.begin[axis] - window.end[axis])
        for axis, (size, out, stride) in enumerate(zip(sizes, outs, window.strides, strict=True))
    ]
    return step.ops.emit(
        "ConvTranspose",
        [step.full(), step.x(1)],
        step.x().shape,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=[*window.begin, *window.end],
        output_padding=left_over,
        group=group,
    )


@rule("ConvTranspose")
def conv_transpose(step: Step) -> None:
    """y = ConvTranspose(x, w); dx = Conv(dy, w) with the same stride, dilation, groups and pads."""
    if step.wants(1) or step.wants(2):
        step.refuse("its weights or bias are computed from the image")
    x, w, y = step.x(0), step.x(1), step.y()
    window = geometry(step, [dim.size for dim in w.shape[2:]])
    begin, end = list(window.begin), list(window.end)
    extra = step.attribute("output_padding", [0] * len(begin))
    auto = step.attribute("auto_pad", "NOTSET")
    if step.attribute("output_shape", [0])[0] or auto in {"SAME_UPPER", "SAME_LOWER"}:
        for axis in range(len(begin)):
            size, out = x.shape[2 + axis].size, y.shape[2 + axis].size
            total = (size - 1) * window.strides[axis] + extra[axis] + window.reach(axis) - out
            small = max(0, total) // 2
            upper = auto == "SAME_UPPER"
            begin[axis], end[axis] = (small, total - small) if upper else (total - small, small)
    dx = step.ops.emit(
        "Conv",
        [step.full(), w],
        x.shape,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=[*begin, *end],
        group=step.attribute("group", 1),
    )
    step.give(0, dx)
