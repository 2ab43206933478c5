"""The part of a graph that some outputs need: the same numbers, by onnx's own reader and by running it."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cut import cut, outputs_of
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.shipped import GRAPHS, graph


def run(model: bytes, outputs: list[str], images: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"images": images})  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_output_alone_is_what_it_is_among_the_others(name: str) -> None:
    whole, (height, width) = graph(name)
    images = np.random.default_rng(1).integers(0, 256, (2, height, width, 3), np.uint8)
    parsed = onnx.load_from_string(whole)
    assert outputs_of(whole) == tuple(info.name for info in parsed.graph.output)
    for output in outputs_of(whole):
        part = cut(whole, [output])
        onnx.checker.check_model(onnx.load_from_string(part))
        assert outputs_of(part) == (output,)
        (alone,), (among,) = run(part, [output], images), run(whole, [output], images)
        assert np.array_equal(alone, among)


def test_features_alone_leave_out_the_nodes_and_constants_of_the_saliency() -> None:
    model = onnx.load_from_string(cut(teacher_graph(), ["features.last"]))
    assert "ReduceMean" not in {node.op_type for node in model.graph.node}
    assert [tensor.name for tensor in model.graph.initializer] == ["full"]
    assert model.opset_import[0].version == 18
    (features,) = run(model.SerializeToString(), ["features.last"], pictures(3))
    assert np.allclose(features, teacher_answers(pictures(3))[0], atol=1e-6)


def test_a_graph_that_is_needed_whole_is_given_back_as_it_is() -> None:
    whole = teacher_graph()
    assert cut(whole, ["saliency", "features.last"]) is whole


def test_nodes_in_no_order_are_refused_and_never_cut_wrongly() -> None:
    model = onnx.load_from_string(teacher_graph())
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[1:], nodes[0]])
    unordered = model.SerializeToString()
    with pytest.raises(CheckFailed, match="do not stand behind those they read"):
        cut(unordered, ["features.last"])
    assert cut(unordered, ["saliency", "features.last"]) is unordered


def test_what_a_graph_inside_a_node_reads_stays() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["kept"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Abs", ["x"], ["kept"]),
        helper.make_node("Exp", ["x"], ["dropped"]),
        helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", "dropped")
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), ir_version=9)
    part = onnx.load_from_string(cut(model.SerializeToString(), ["out"]))
    assert [node.op_type for node in part.graph.node] == ["Abs", "If"]


def test_an_output_it_does_not_have_is_said_with_those_it_has() -> None:
    with pytest.raises(CheckFailed, match=r"no output logits; it has features\.last, saliency"):
        cut(teacher_graph(), ["logits"])
    with pytest.raises(CheckFailed, match="no output of no name"):
        cut(teacher_graph(), [])


@given(st.binary(max_size=200))
def test_what_is_no_onnx_file_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(CheckFailed, match=r"no ONNX file|has no output"):
        cut(data, ["saliency"])


@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    whole = bytearray(teacher_graph())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    end = data.draw(st.integers(at, len(whole)))
    with contextlib.suppress(CheckFailed):
        cut(bytes(whole[:end]), ["features.last"])
