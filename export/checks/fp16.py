"""Half precision, decided in the ONNX graph: the copy a GPU runs, and whether its maps still agree.

Preprocessing and the min-max at the end stay in float32; the network and its derivative become float16, with
casts at the borders. Runtimes choose no precision by themselves (TensorRT 11 has no such flag any more).
"""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.graph.network import session

AGREEMENT = 0.99


class HalfReport(msgspec.Struct, frozen=True):
    """Agreement of the float16 copy's maps with the float32 maps on real photographs."""

    images: int
    worst_cosine: float
    mean_cosine: float
    bytes: int

    @property
    def agrees(self) -> bool:
        return self.worst_cosine >= AGREEMENT

    @property
    def warning(self) -> str | None:
        """What to tell the owner; None if all is well."""
        if self.agrees:
            return None
        return (
            f"in half precision the saliency map of an image agrees only to a cosine of "
            f"{self.worst_cosine:.3f} (wanted: {AGREEMENT}); run this teacher in float32"
        )


def to_half(teacher: onnx.ModelProto) -> onnx.ModelProto:
    """A float16 copy of a teacher graph with the same uint8 input and float32 outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(teacher)
    single = [node.name for node in copy.graph.node if node.name.startswith("images/")]
    single += _normalisation(copy.graph)
    converted: onnx.ModelProto = convert_float_to_float16(
        copy, keep_io_types=True, disable_shape_infer=True, node_block_list=single
    )
    return converted


def _normalisation(graph: onnx.GraphProto) -> list[str]:
    """The nodes of the min-max per image: everything after the last ReduceMin's input."""
    lows = [
        node
        for node in graph.node
        if node.op_type == "ReduceMin" and node.name.startswith("saliency/")
    ]
    if not lows:
        return []
    reached, names = {lows[-1].input[0]}, []
    for node in graph.node:
        if any(name in reached for name in node.input):
            reached.update(node.output)
            names.append(node.name)
    return names


def check_half(teacher: onnx.ModelProto, photographs: NDArray[np.uint8]) -> HalfReport:
    """Compare maps on photographs uint8[N, H, W, 3]; two flat maps agree, a flat and another do not."""
    half = to_half(teacher)
    maps = [
        session(model)
        .run(["saliency"], {"images": photographs})[0]
        .reshape(len(photographs), -1)
        .astype(np.float64)
        for model in (teacher, half)
    ]
    norms = [np.linalg.norm(each, axis=1) for each in maps]
    product = norms[0] * norms[1]
    cosine = np.where(
        product > 0, (maps[0] * maps[1]).sum(1) / np.where(product > 0, product, 1), 0.0
    )
    cosine = np.where((norms[0] == 0) & (norms[1] == 0), 1.0, cosine)
    return HalfReport(len(photographs), float(cosine.min()), float(cosine.mean()), half.ByteSize())
