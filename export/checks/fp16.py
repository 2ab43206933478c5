"""Half precision, decided in the ONNX graph: the copy a GPU runs, and whether its maps still agree.

Preprocessing and the min-max at the end stay in float32; the network and its derivative become float16, with
casts at the borders. Runtimes choose no precision by themselves (TensorRT 11 has no such flag any more).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from edge_teacher.contract.errors import CheckFailed
from export.checks.tensorrt import TensorRtVerdict
from export.graph.network import session

AGREEMENT = 0.99
PREPROCESSING = "images/"  # what `export.graph.wrap` calls its nodes


class HalfReport(msgspec.Struct, frozen=True):
    """Agreement of the float16 copy's maps with the float32 maps."""

    images: int
    other_class: int
    """Images for which half precision picks another top class: their maps explain something else."""
    worst_cosine: float | None
    """Over the images of the same class; None if there is none."""
    mean_cosine: float | None
    bytes: int
    tensorrt: TensorRtVerdict | None = None

    @property
    def usable(self) -> bool:
        """Whether a device with a GPU should be given the copy."""
        return self.agrees and (self.tensorrt is None or self.tensorrt.accepted is not False)

    @property
    def agrees(self) -> bool:
        return self.worst_cosine is not None and self.worst_cosine >= AGREEMENT

    @property
    def warning(self) -> str | None:
        """What to tell the owner; None if all is well."""
        if not self.agrees:
            found = (
                "of no image" if self.worst_cosine is None else f"only to {self.worst_cosine:.3f}"
            )
            return (
                f"in half precision saliency maps agree {found} (cosine; wanted: {AGREEMENT}): run this "
                "teacher in float32"
            )
        if self.tensorrt is not None and self.tensorrt.accepted is False:
            return f"TensorRT does not take the copy in half precision: {self.tensorrt.detail}"
        if self.other_class:
            return (
                f"in half precision {self.other_class} of {self.images} images have another top class, and "
                f"so a map of that one; the other maps agree (cosine at least {self.worst_cosine:.4f})"
            )
        return None


class NoHalfCopy(CheckFailed):
    """The converter makes no copy of this graph that runs."""


def to_half(teacher: onnx.ModelProto) -> onnx.ModelProto:
    """A float16 copy of a teacher graph with the same uint8 input and float32 outputs.

    Only what lies between the two parts that stay in float32 is handed to ONNX Runtime's converter: told to
    leave single nodes alone, it would take every tensor between two of them through float16 and back.
    """
    nodes = list(teacher.graph.node)
    front = [node for node in nodes if node.name.startswith(PREPROCESSING)]
    tail = _normalisation(nodes)
    apart = {node.name for node in (*front, *tail)}
    middle = [node for node in nodes if node.name not in apart]
    made = {name for node in middle for name in node.output}
    read = {name for node in middle for name in node.input}
    wanted = {info.name for info in teacher.graph.output}
    wanted |= {name for node in tail for name in node.input}
    prepared = [name for node in front for name in node.output if name in read]
    core = helper.make_graph(
        middle,
        "core",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in prepared],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in sorted(made & wanted)
        ],
        [tensor for tensor in teacher.graph.initializer if tensor.name in read],
    )
    half: onnx.ModelProto = convert_float_to_float16(
        helper.make_model(core, opset_imports=teacher.opset_import, ir_version=teacher.ir_version),
        keep_io_types=True,
        disable_shape_infer=True,
    )
    outside = {name for node in (*front, *tail) for name in node.input}
    single = {}  # constants the outer parts read; the converter may have halved those of the same name
    for tensor in teacher.graph.initializer:
        if tensor.name not in outside:
            continue
        single[tensor.name] = onnx.TensorProto()
        single[tensor.name].CopyFrom(tensor)
        single[tensor.name].name = f"single/{tensor.name}"
    outer = [_reading(node, single) for node in (*front, *tail)]
    whole = helper.make_graph(
        [*outer[: len(front)], *half.graph.node, *outer[len(front) :]],
        teacher.graph.name,
        teacher.graph.input,
        teacher.graph.output,
        [*half.graph.initializer, *single.values()],
    )
    # The converter appends its casts; ONNX wants every node behind those it reads, and TensorRT insists.
    OnnxModel.graph_topological_sort(whole)
    return helper.make_model(
        whole,
        opset_imports=teacher.opset_import,
        ir_version=teacher.ir_version,
        producer_name=teacher.producer_name,
    )


def _reading(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> onnx.NodeProto:
    """The node, with its constants taken from `constants`."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for i, name in enumerate(node.input):
        if name in constants:
            copy.input[i] = constants[name].name
    return copy


def _normalisation(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes of the min-max per image: everything after the last ReduceMin's input."""
    lows = [n for n in nodes if n.op_type == "ReduceMin" and n.name.startswith("saliency/")]
    if not lows:
        return []
    reached, found = {lows[-1].input[0]}, []
    for node in nodes:
        if any(name in reached for name in node.input):
            reached.update(node.output)
            found.append(node)
    return found


def check_half(teacher: onnx.ModelProto, images: NDArray[np.uint8]) -> HalfReport:
    """Compare maps on images uint8[N, H, W, 3]; two flat maps agree, a flat and another do not.

    Raises NoHalfCopy, for one with quantised parts, say.
    """
    maps, choice = _maps(teacher, images)
    try:
        half = to_half(teacher)
        others, other_choice = _maps(half, images)
    except Exception as error:  # the converter and ONNX Runtime raise types of their own
        reason = " ".join(str(error).split())[:200]
        raise NoHalfCopy(f"no copy in half precision could be made ({reason})") from error
    same = choice == other_choice
    norms, other_norms = (np.linalg.norm(each, axis=1) for each in (maps, others))
    product = norms * other_norms
    cosine = np.where(product > 0, (maps * others).sum(1) / np.where(product > 0, product, 1), 0.0)
    cosine = np.where((norms == 0) & (other_norms == 0), 1.0, cosine)[same]
    return HalfReport(
        images=len(images),
        other_class=int((~same).sum()),
        worst_cosine=float(cosine.min()) if len(cosine) else None,
        mean_cosine=float(cosine.mean()) if len(cosine) else None,
        bytes=half.ByteSize(),
    )


def _maps(
    teacher: onnx.ModelProto, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(maps [N, pixels], the class each explains [N]); the class is 0 where the graph chooses none."""
    told = onnx.ModelProto()
    told.CopyFrom(teacher)
    chosen = [
        node.output[0]
        for node in told.graph.node
        if node.op_type == "ArgMax" and node.name.startswith("saliency/")
    ]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chosen)
    maps, *choices = session(told).run(["saliency", *chosen], {"images": images})
    flat: NDArray[np.float64] = maps.reshape(len(images), -1).astype(np.float64)
    # One choice per image: a dense head, which chooses at every position, is compared as it is.
    single = [c.reshape(-1) for c in choices if c.size == len(images)]
    return flat, single[0] if single else np.zeros(len(images), np.int64)
