"""The first nodes of every exported student: from a photograph's pixels to what the network knows.

With resizing and normalisation inside the graph, every student looks the same from outside and a
device has no pre-processing to get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edge_teacher.contract.errors import UsageError

IMAGES = "images"
INPUT_PREFIX = "input/"


@dataclass(frozen=True)
class StudentInput:
    """What the network was trained on.

    Attributes:
        size: height and width in pixels of what the network sees.
        mean, std: one per channel (red, green, blue), for pixels scaled to [0, 1].
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(
                f"input size {self.size} is not (height, width): give two numbers of at least 1"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UsageError(
                f"mean {self.mean} and std {self.std} need three numbers each, one per channel"
            )
        if not np.isfinite(self.mean).all() or not (np.asarray(self.std) > 0).all():
            raise UsageError(
                f"mean {self.mean} must be finite and std {self.std} above zero: "
                "check the normalisation"
            )


def take_uint8_images(net: onnx.ModelProto, given: StudentInput) -> onnx.ModelProto:
    """`net` behind an input `images: uint8[N, H, W, 3]` of any N, H and W.

    The input of `net` is float[N, 3, h, w], resized and normalised. Resizing is ONNX Resize, linear
    with half-pixel centres and no antialiasing, which is what
    `F.interpolate(mode="bilinear", align_corners=False)` does; at the network's own size it changes
    nothing.
    """
    height, width = given.size
    inner = net.graph.input[0].name
    # Cast comes first: TensorRT takes a UINT8 input only into a Cast. All four axes have a size:
    # the `axes` attribute of Resize is younger than some parsers in the field.
    linear = 'mode = "linear", coordinate_transformation_mode = "half_pixel"'
    text = f"""
    <ir_version: {net.ir_version}, opset_import: ["" : {net.opset_import[0].version}]>
    take (uint8[N, H, W, 3] {IMAGES}) => (float[N, 3, {height}, {width}] normalised)
    <int64[3] chw = {{3, {height}, {width}}}> {{
        pixels = Cast<to = {TensorProto.FLOAT}>({IMAGES})
        planes = Transpose<perm = [0, 3, 1, 2]>(pixels)
        count = Shape<start = 0, end = 1>({IMAGES})
        sizes = Concat<axis = 0>(count, chw)
        resized = Resize<{linear}>(planes, , , sizes)
        centred = Sub(resized, mean)
        normalised = Mul(centred, scale)
    }}
    """
    front = onnx.parser.parse_model(text).graph
    channels = (1, 3, 1, 1)
    mean = 255 * np.asarray(given.mean, np.float64).reshape(channels)
    scale = 1 / (255 * np.asarray(given.std, np.float64).reshape(channels))
    front.initializer.append(numpy_helper.from_array(mean.astype(np.float32), "mean"))
    front.initializer.append(numpy_helper.from_array(scale.astype(np.float32), "scale"))

    result = onnx.ModelProto()
    result.CopyFrom(net)
    names = {IMAGES: IMAGES, "normalised": inner, "": ""}
    for initializer in front.initializer:
        initializer.name = names.setdefault(initializer.name, INPUT_PREFIX + initializer.name)
    for node in front.node:
        node.name = INPUT_PREFIX + node.op_type
        for slots in (node.input, node.output):
            slots[:] = [names.setdefault(name, INPUT_PREFIX + name) for name in slots]
    del result.graph.node[:], result.graph.input[:]
    result.graph.node.extend([*front.node, *net.graph.node])
    result.graph.input.append(front.input[0])
    result.graph.initializer.extend(front.initializer)
    return result
