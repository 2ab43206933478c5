"""From any ONNX file to a measured network with a dynamic batch and one known image size."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto

from export.graph.batch import free_batch
from export.graph.emit import FLOATS
from export.graph.errors import UnsupportedNetwork
from export.graph.network import Network, measure, prune
from export.graph.opset import to_opset18
from export.graph.shapes import BATCH
from export.graph.wrap import InputSpec

_PIXEL_TYPES = FLOATS | {int(TensorProto.UINT8)}


def prepare(model: onnx.ModelProto, spec: InputSpec, keep: Iterable[str] | None = None) -> Network:
    """The network in opset 18, pruned to `keep` (default: its outputs), its batch dynamic, measured.

    Raises UnsupportedNetwork for several inputs, no image input, a tensor in `keep` that does not exist, or a
    network that does not run at batch 2 and 3.
    """
    native = to_opset18(model)
    graph = native.graph
    image = image_input(graph)
    _refuse_dynamic_quantisation(graph)
    made = {name for node in graph.node for name in node.output if name}
    wanted = [info.name for info in graph.output] if keep is None else list(dict.fromkeys(keep))
    for name in wanted:
        if name not in made:
            raise UnsupportedNetwork(
                f"the network has no tensor {name!r}; "
                "`fedsa export inspect` lists the tensors that can be tapped"
            )
    if image.type.tensor_type.elem_type == TensorProto.UINT8:
        # Resized pixels have fractions, which a cast would cut off: the network's own cast keeps them.
        image.type.tensor_type.elem_type = TensorProto.FLOAT
    batch = _set_input_shape(image, spec)
    _drop_annotations(native)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    prune(graph, wanted)
    return _measure_freed(native, image.name, spec.shape, batch)


def _measure_freed(
    model: onnx.ModelProto, image: str, sizes: tuple[int, ...], batch: int | None
) -> Network:
    """Measure the model, with a batch that is written into it freed first; `batch` is what the input says.

    Exporters also declare a dynamic batch over constants of one image: then the model does not run, or joins
    the images in its outputs.
    """
    if batch is not None:
        free_batch(model, image, sizes, batch)
        return measure(model, image, sizes)
    untouched = onnx.ModelProto()
    untouched.CopyFrom(model)
    try:
        network = measure(model, image, sizes)
    except UnsupportedNetwork as refusal:
        if not _freed_too(untouched, image, sizes):
            raise refusal from None
        return measure(untouched, image, sizes)
    joined = any(_joins_images(network, info.name) for info in model.graph.output)
    if joined and _freed_too(untouched, image, sizes):
        return measure(untouched, image, sizes)
    return network


def _joins_images(network: Network, name: str) -> bool:
    """Whether an output does not start with the batch: then images were joined, or all but one dropped."""
    return network.has(name) and network.value(name).shape[:1] != (BATCH,)


def _freed_too(model: onnx.ModelProto, image: str, sizes: tuple[int, ...]) -> bool:
    try:
        return free_batch(model, image, sizes, 1)
    except UnsupportedNetwork:  # then it is as its author meant it
        return False


def _refuse_dynamic_quantisation(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type.startswith("DynamicQuantize"):
            raise UnsupportedNetwork(
                f"the network is quantised on the fly ({node.op_type} at node {node.name!r}): its numbers "
                "depend on all the images of a batch, and rounding has no derivative; "
                "use the float network it was made of"
            )


def image_input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    """The only input of the network; initialisers that old exporters also list as inputs are dropped."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [info for info in graph.input if info.name not in stored]
    del graph.input[:]
    graph.input.extend(inputs)
    if len(inputs) != 1:
        names = [info.name for info in inputs]
        raise UnsupportedNetwork(
            f"the network has {len(inputs)} inputs {names}; a teacher needs exactly one, an image: "
            "make constants of the others before exporting"
        )
    image: onnx.ValueInfoProto = graph.input[0]
    tensor = image.type.tensor_type
    rank = len(tensor.shape.dim)
    if tensor.elem_type not in _PIXEL_TYPES or rank != 4:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise UnsupportedNetwork(
            f"input {inputs[0].name!r} is {kind} of rank {rank}, not a batch of images "
            "(float or uint8 of rank 4)"
        )
    return image


def _set_input_shape(info: onnx.ValueInfoProto, spec: InputSpec) -> int | None:
    """Replace the input's shape by [N, *spec.shape], if that is compatible with what the file says.

    Returns the batch the file says; None if it is free.
    """
    dims = info.type.tensor_type.shape.dim
    said = [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims
    ]
    for position, (have, want) in enumerate(zip(said[1:], spec.shape, strict=True)):
        if have is not None and have != want:
            raise UnsupportedNetwork(
                f"input {info.name!r} has shape {said} (None: free), and the manifest says "
                f"{[None, *spec.shape]} ({spec.layout}, {spec.channels}): "
                f"axis {position + 1} is {have}, not {want}"
            )
    dims[0].Clear()
    dims[0].dim_param = "N"
    for dim, size in zip(dims[1:], spec.shape, strict=False):
        dim.Clear()
        dim.dim_value = size
    return said[0]


def _drop_annotations(model: onnx.ModelProto) -> None:
    """Remove stack traces, doc strings and old shapes: they say where the owner's source lies."""
    model.ClearField("doc_string")
    del model.metadata_props[:]
    graph = model.graph
    graph.ClearField("doc_string")
    del graph.value_info[:], graph.metadata_props[:], graph.quantization_annotation[:]
    for entry in [*graph.node, *graph.initializer, *graph.input]:
        entry.ClearField("doc_string")
        del entry.metadata_props[:]
