"""Convolutions. A convolution's input gradient is the transposed convolution with the same weights.

Along one axis y[o] = sum_k w[k] x[s o + d k - p], so dx[i] = sum over (o, k) with s o + d k - p = i of w[k]
dy[o]: a ConvTranspose with the same stride, dilation, groups and pads. It yields (O - 1) s + (K - 1) d + 1 - p
- p' values, up to s - 1 fewer than x has where the stride left some over; `output_padding` adds exactly those.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.graph.registry import Step, rule


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
    if step.wants(1):
        step.refuse("its weights are computed from the image")
    x, w, y = step.x(0), step.x(1), step.y()
    window = geometry(step, [dim.size for dim in w.shape[2:]])
    group = step.attribute("group", 1)
    sizes = [dim.size for dim in x.shape[2:]]
    outs = [dim.size for dim in y.shape[2:]]
    left_over = [
        size - ((out - 1) * stride + window.reach(axis) - window.begin[axis] - window.end[axis])
        for axis, (size, out, stride) in enumerate(zip(sizes, outs, window.strides, strict=True))
    ]
    if step.wants(2):
        step.refuse("its bias is computed from the image")
    dx = step.ops.emit(
        "ConvTranspose",
        [step.full(), w],
        x.shape,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=[*window.begin, *window.end],
        output_padding=left_over,
        group=group,
    )
    step.give(0, dx)
