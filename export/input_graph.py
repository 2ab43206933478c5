"""The first nodes of every exported student: from a photograph's pixels to what the network knows.

With resizing and normalisation inside the graph, every student looks the same from outside and a
device has no pre-processing to get wrong. The nodes are those of a teacher (`export.graph.wrap`).
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from export.graph import InputSpec
from export.graph.emit import Ops
from export.graph.wrap import images_info, preprocess

IMAGES = "images"
INPUT_PREFIX = "input/"


def take_uint8_images(net: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """`net`, float[N, 3, h, w] -> …, behind an input `images: uint8[N, H, W, 3]` of any N, H, W."""
    front = Ops(INPUT_PREFIX.rstrip("/"))
    pixels = preprocess(front, spec, int(TensorProto.FLOAT), IMAGES)
    inner = net.graph.input[0].name
    result = onnx.ModelProto()
    result.CopyFrom(net)
    for node in result.graph.node:
        node.input[:] = [pixels.name if name == inner else name for name in node.input]
    nodes = [*front.nodes, *result.graph.node]
    del result.graph.node[:], result.graph.input[:]
    result.graph.node.extend(nodes)
    result.graph.input.append(images_info(IMAGES))
    result.graph.initializer.extend(front.initializers.values())
    return result
