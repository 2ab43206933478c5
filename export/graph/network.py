"""A network as the reverse pass sees it: nodes in order, every shape, and which values are constants.

No symbolic inference: the model is run at batch 2 and at batch 3. A size that stays is a constant, one that
grows with the batch is a multiple of N, and a tensor whose shape is neither is unknown and refused where it is
needed. The same two runs fold shape arithmetic: what does not depend on the image's pixels and is equal in
both runs is a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.emit import Value
from export.graph.errors import UnsupportedNetwork
from export.graph.shapes import observed

_READS_SHAPE_ONLY = {"Shape", "Size"}
_MAKES_SEQUENCES = {
    "SplitToSequence",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceInsert",
    "SequenceErase",
}
_SHAPE, _TYPE = "/probed shape", "/probed type"
_FOLD_ELEMENTS = 4096  # a folded constant larger than this would grow the file


class Network:
    """An opset-18 model with one image input, measured.

    Build it with `measure`. `value(name)` gives shape and type of any tensor, `constant(name)` the array of
    one that does not depend on the pixels or on N.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        input_name: str,
        values: dict[str, Value],
        constants: dict[str, NDArray[np.generic]],
    ) -> None:
        self.model = model
        self.input_name = input_name
        self.values = values
        self._constants = constants
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output if name}

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.graph.node)

    def value(self, name: str) -> Value:
        if name not in self.values:
            if name not in self._initializers:
                raise UnsupportedNetwork(
                    f"the shape of tensor {name!r} is neither constant nor a multiple of the batch size; "
                    "tap a tensor after it"
                )
            tensor = self._initializers[name]
            from_dims = observed(tensor.dims, tensor.dims)
            self.values[name] = Value(name, from_dims or (), tensor.data_type)
        return self.values[name]

    def has(self, name: str) -> bool:
        return name in self.values or name in self._initializers

    def constant(self, name: str) -> NDArray[np.generic] | None:
        if name not in self._constants and name in self._initializers:
            self._constants[name] = numpy_helper.to_array(self._initializers[name])
        return self._constants.get(name)

    def descendants(self, roots: Iterable[str]) -> set[str]:
        """Every tensor whose numbers are computed from `roots`, the roots among them."""
        reached = set(roots)
        for node in self.model.graph.node:
            if any(name in reached for name in reads_numbers(node)):
                reached.update(name for name in node.output if name)
        return reached

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Every tensor whose numbers `names` are computed from, themselves among them."""
        reached = set(names)
        for node in reversed(self.model.graph.node):
            if any(name in reached for name in node.output):
                reached.update(name for name in reads_numbers(node) if name)
        return reached


def reads_numbers(node: onnx.NodeProto) -> list[str]:
    """The inputs whose numbers matter to a node, not only their shape or type."""
    if node.op_type in _READS_SHAPE_ONLY:
        return []
    return list(node.input[:1]) if node.op_type == "CastLike" else _reads(node)


def _reads(node: onnx.NodeProto) -> list[str]:
    """A node's inputs, and what its subgraphs take from outside."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inside = {out for child in attribute.g.node for out in child.output}
            inside |= {info.name for info in attribute.g.input}
            inside |= {tensor.name for tensor in attribute.g.initializer}
            names += [
                name for child in attribute.g.node for name in _reads(child) if name not in inside
            ]
    return names


def prune(graph: onnx.GraphProto, wanted: Iterable[str]) -> None:
    """Drop nodes and initialisers that `wanted` do not need, in place."""
    needed = set(wanted)
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(_reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(initializers) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)


def session(model: onnx.ModelProto, *, optimise: bool = True) -> ort.InferenceSession:
    """One thread, CPU, silent."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def measure(model: onnx.ModelProto, input_name: str, sizes: tuple[int, ...]) -> Network:
    """Run the model at batch 2 and 3 and learn every shape and every constant.

    `sizes` is the input's shape without the batch. Raises UnsupportedNetwork if the model does not run.
    """
    graph = model.graph
    lift_constants(graph)
    info = next(info for info in graph.input if info.name == input_name)
    dependent = pixel_dependent(graph, input_name)
    two, three = observe(model, input_name, sizes, (2, 3), dependent)

    shape = tuple(observed((2, *sizes), (3, *sizes)) or ())
    values = {input_name: Value(input_name, shape, info.type.tensor_type.elem_type)}
    constants: dict[str, NDArray[np.generic]] = {}
    for name, at_two in two.items():
        at_three = three[name]
        if (found := observed(at_two.shape, at_three.shape)) is not None:
            values[name] = Value(name, found, at_two.dtype)
        if at_two.array is not None and at_three.array is not None:
            same = at_two.shape == at_three.shape
            if same and np.array_equal(at_two.array, at_three.array):
                constants[name] = at_two.array
    _fold(graph, constants)
    return Network(model, input_name, values, constants)


class Observation(NamedTuple):
    """What one run showed of one tensor; `array` only where it does not depend on the pixels."""

    shape: tuple[int, ...]
    dtype: int
    array: NDArray[np.generic] | None


def observe(
    model: onnx.ModelProto,
    input_name: str,
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    dependent: set[str],
) -> list[dict[str, Observation]]:
    """Run the model at each batch size and look at every tensor a node makes.

    Of tensors that depend on the pixels only shape and type leave the runtime, as a `Shape` node and an empty
    slice: keeping the maps of a large network themselves would take gigabytes. Sequences are left out. Raises
    UnsupportedNetwork if the model does not run.
    """
    image = random_images(model, input_name, (max(batches), *sizes))
    try:
        runner, ask = _probe(model, dependent)
        runs = [runner.run(ask, {input_name: image[:batch]}) for batch in batches]
    except Exception as error:
        counts = " and ".join(map(str, batches))
        raise UnsupportedNetwork(
            f"ONNX Runtime cannot run the network at batch {counts}: {error}"
        ) from error
    return [_observations(dict(zip(ask, results, strict=True)), dependent) for results in runs]


def random_images(
    model: onnx.ModelProto, input_name: str, shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """Noise of the input's type: between 0 and 1, or all of uint8."""
    info = next(info for info in model.graph.input if info.name == input_name)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    generator = np.random.default_rng(0)
    if dtype.kind == "u":
        return generator.integers(0, 256, shape).astype(dtype)
    return generator.uniform(0, 1, shape).astype(dtype)


def _probe(model: onnx.ModelProto, dependent: set[str]) -> tuple[ort.InferenceSession, list[str]]:
    """A session that puts out shape and a zero of the type of every tensor in `dependent`, and all others."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    del graph.output[:], graph.value_info[:], graph.node[:]
    zero = numpy_helper.from_array(np.zeros((), np.float32), "probe/zero")
    graph.initializer.append(zero)
    ask = []
    for node in model.graph.node:
        graph.node.append(node)
        if node.op_type in _MAKES_SEQUENCES:
            continue
        for name in node.output:  # at once, so that the runtime may drop the tensor
            if name in dependent:
                graph.node.append(helper.make_node("Shape", [name], [name + _SHAPE]))
                graph.node.append(helper.make_node("CastLike", [zero.name, name], [name + _TYPE]))
                ask += [name + _SHAPE, name + _TYPE]
            elif name:
                ask.append(name)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in ask)
    return session(probe, optimise=False), ask


def _observations(
    results: dict[str, NDArray[np.generic]], dependent: set[str]
) -> dict[str, Observation]:
    seen = {}
    for name, array in results.items():
        tensor = name.removesuffix(_SHAPE)
        if tensor != name and tensor in dependent:
            sizes = tuple(int(size) for size in array.reshape(-1).tolist())
            seen[tensor] = Observation(sizes, _type_of(results[tensor + _TYPE]), None)
        elif name.removesuffix(_TYPE) not in dependent and isinstance(array, np.ndarray):
            seen[name] = Observation(array.shape, _type_of(array), array)
    return seen


def _type_of(array: NDArray[np.generic]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initialisers: one kind of constant instead of two."""
    kept = []
    for node in graph.node:
        if node.op_type != "Constant":
            kept.append(node)
            continue
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        elif attribute.name in {"value_float", "value_floats"}:
            tensor = numpy_helper.from_array(np.asarray(value, np.float32), node.output[0])
        elif attribute.name in {"value_int", "value_ints"}:
            tensor = numpy_helper.from_array(np.asarray(value, np.int64), node.output[0])
        else:
            kept.append(node)
            continue
        graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def pixel_dependent(graph: onnx.GraphProto, input_name: str) -> set[str]:
    """Tensors that depend on the image's pixels, and not only on its shape."""
    reached = {input_name}
    for node in graph.node:
        random = node.op_type.startswith("Random") or node.op_type in {"Bernoulli", "Multinomial"}
        if random or any(name in reached for name in reads_numbers(node)):
            reached.update(name for name in node.output if name)
    return reached


def _fold(graph: onnx.GraphProto, constants: dict[str, NDArray[np.generic]]) -> None:
    """Replace nodes whose outputs are all small constants by initialisers."""
    kept = []
    for node in graph.node:
        outputs = [name for name in node.output if name]
        if all(name in constants and constants[name].size <= _FOLD_ELEMENTS for name in outputs):
            graph.initializer.extend(
                numpy_helper.from_array(np.ascontiguousarray(constants[name]), name)
                for name in outputs
            )
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    prune(graph, {info.name for info in graph.output})
