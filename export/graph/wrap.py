"""From `images: uint8[N, H, W, 3]` to whatever the network wants as its input."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto

from export.graph.emit import Ops, Value
from export.graph.errors import UnsupportedNetwork
from export.graph.shapes import BATCH, Dim, fixed

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what PIL and OpenCV call grey
_ANY = Dim(
    -1
)  # H and W of the images: unknown until they are resized, and no node before that looks at them


class InputSpec(msgspec.Struct, frozen=True):
    """How the network wants its images: `(pixel * scale - mean) / std`, pixels 0-255, per channel.

    size: (H, W) in pixels. Images of another size are resized linearly, half-pixel centres, no antialiasing:
    exactly torch's `F.interpolate(mode="bilinear", align_corners=False)`. mean and std have one number per
    channel, or one for all. scale is 1/255 for a network trained on 0-1, 1 for one trained on 0-255.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "grey"] = "RGB"
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        count = 1 if self.channels == "grey" else 3
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, count):
                raise UnsupportedNetwork(
                    f"{name} has {len(numbers)} numbers; a {self.channels} network takes {count}, "
                    "or one for all"
                )
        if not np.isfinite([*self.mean, *self.std, self.scale]).all():
            raise UnsupportedNetwork(
                f"mean {self.mean}, std {self.std} and scale {self.scale} must be finite numbers"
            )
        if min(self.size) < 1 or min(np.abs(self.std)) == 0 or self.scale == 0:
            raise UnsupportedNetwork(
                f"size {self.size} must be positive, and std {self.std} and scale {self.scale} not zero"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The network's input without the batch, in its own layout."""
        planes = 1 if self.channels == "grey" else 3
        height, width = self.size
        return (planes, height, width) if self.layout == "NCHW" else (height, width, planes)


def images_info(name: str = "images") -> onnx.ValueInfoProto:
    """The graph input every teacher has."""
    return onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", "H", "W", 3])


def preprocess(ops: Ops, spec: InputSpec, dtype: int, images: str = "images") -> Value:
    """Nodes from `images` to the network's input, as float of type `dtype`."""
    single = int(TensorProto.FLOAT)
    height, width = (Dim(size) for size in spec.size)
    pixels = Value(images, (BATCH, _ANY, _ANY, Dim(3)), int(TensorProto.UINT8))
    planes = ops.transpose(ops.cast(pixels, single), [0, 3, 1, 2])
    if spec.channels == "BGR":
        planes = ops.emit("Gather", [planes, ops.constant([2, 1, 0])], planes.shape, axis=1)
    if spec.channels == "grey":
        weights = ops.constant(np.reshape(_LUMA, (1, 3, 1, 1)), single)
        planes = ops.emit("Conv", [planes, weights], (BATCH, Dim(1), _ANY, _ANY))
    # Sizes without `axes`, as the exporters write it: every TensorRT parses this form.
    leading = ops.emit("Shape", [planes], fixed([2]), int(TensorProto.INT64), end=2)
    target = ops.concat([leading, ops.constant(list(spec.size))], 0)
    resized = ops.emit(
        "Resize",
        [planes, None, None, target],
        (BATCH, planes.shape[1], height, width),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    # (x * scale - mean) / std as one multiplication and one addition per pixel
    std = np.asarray(spec.std, np.float64)
    factor, offset = spec.scale / std, -np.asarray(spec.mean, np.float64) / std
    x = resized
    if np.any(factor != 1):
        x = ops.mul(x, ops.constant(factor.reshape(1, -1, 1, 1), single))
    if np.any(offset != 0):
        x = ops.add(x, ops.constant(offset.reshape(1, -1, 1, 1), single))
    if spec.layout == "NHWC":
        x = ops.transpose(x, [0, 2, 3, 1])
    return ops.cast(x, dtype)
