"""ONNX Runtime's session: outputs in one pass, and parts of the graph where that pays."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.runtime import onnxruntime as module
from edge_teacher.runtime.onnxruntime import CUDA, OnnxRuntimeSession
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.same import same


def heavy_graph(products: int = 12) -> bytes:
    """The tiny teacher whose saliency goes through products of large matrices first, and is not changed."""
    model = onnx.load_from_string(teacher_graph())
    final = model.graph.node[-1]
    model.graph.initializer.extend(
        [
            helper.make_tensor("side", TensorProto.INT64, [2], [256, 256]),
            helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0]),
        ]
    )
    # Made of the picture, or it would be computed once and for all when the graph is loaded.
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "side"], ["m0"]),
    ]
    for i in range(products):
        nodes.append(helper.make_node("MatMul", [f"m{i}", "m0"], [f"p{i}"]))
        nodes.append(helper.make_node("Tanh", [f"p{i}"], [f"m{i + 1}"]))
    nodes += [
        helper.make_node("ReduceMax", [f"m{products}"], ["end"], keepdims=0),
        helper.make_node("Mul", ["end", "nothing"], ["zero"]),
        helper.make_node("Add", ["features.last", "zero"], ["same"]),
    ]
    final.input[0] = "same"
    del model.graph.node[-1]
    model.graph.node.extend([*nodes, final])
    onnx.checker.check_model(model)
    return model.SerializeToString()


def part_of(session: OnnxRuntimeSession, *outputs: str) -> bool:
    """Whether these outputs come from a graph of their own."""
    return session._parts[frozenset(outputs)] is not session._whole


def test_all_outputs_come_in_one_pass() -> None:
    session = OnnxRuntimeSession(teacher_graph(), threads=1)
    images = pictures(3)
    features, saliency = teacher_answers(images)
    found = session.run(images, ["saliency", "features.last"])
    same(found["saliency"], saliency)
    same(found["features.last"], features)
    assert not session._parts


def test_features_alone_do_not_pay_for_an_expensive_saliency() -> None:
    session = OnnxRuntimeSession(heavy_graph(), threads=1)
    images = pictures(3)
    features, saliency = teacher_answers(images)
    for _ in range(2):
        same(session.run(images, ["features.last"])["features.last"], features)
    assert part_of(session, "features.last")
    same(session.run(images, ["saliency"])["saliency"], saliency)


@pytest.mark.parametrize(("share", "worth"), [(0.5, True), (0.99, False)])
def test_a_part_is_kept_only_if_it_saves_time(
    share: float, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_share", lambda *_, **__: share)
    session = OnnxRuntimeSession(teacher_graph(), threads=1)
    session.run(pictures(2), ["features.last"])
    assert part_of(session, "features.last") is worth


def test_a_part_that_answers_otherwise_is_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.load_from_string(teacher_graph())
    (pool,) = [node for node in model.graph.node if node.op_type == "AveragePool"]
    pool.op_type = "MaxPool"
    monkeypatch.setattr(module, "cut", lambda *_: model.SerializeToString())
    session = OnnxRuntimeSession(teacher_graph(), threads=1)
    same(
        session.run(pictures(2), ["features.last"])["features.last"],
        teacher_answers(pictures(2))[0],
    )
    assert not part_of(session, "features.last")
    assert "answers otherwise than the whole graph" in caplog.text


def test_a_file_whose_nodes_are_in_no_order_is_used_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime sorts them; a part of it cannot be told."""
    model = onnx.load_from_string(teacher_graph())
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    session = OnnxRuntimeSession(model.SerializeToString(), threads=1)
    found = session.run(pictures(2), ["features.last"])
    same(found["features.last"], teacher_answers(pictures(2))[0])
    assert not part_of(session, "features.last")
    assert "come from the whole graph" in caplog.text


def test_only_so_many_parts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_share", lambda *_, **__: 0.1)
    monkeypatch.setattr(module, "MAX_PARTS", 1)
    session = OnnxRuntimeSession(teacher_graph(), threads=1)
    session.run(pictures(2), ["features.last"])
    session._parts[frozenset(["other"])] = session._parts[frozenset(["features.last"])]
    del session._parts[frozenset(["features.last"])]
    session.run(pictures(2), ["features.last"])
    assert set(session._parts) == {frozenset(["features.last"])}


def test_a_provider_that_does_not_work_here_is_no_silent_cpu() -> None:
    with pytest.raises(CheckFailed, match="no working CUDAExecutionProvider"):
        OnnxRuntimeSession(teacher_graph(), threads=1, provider=CUDA)


def test_what_it_cannot_load_and_what_it_cannot_run_is_one_sentence() -> None:
    with pytest.raises(CheckFailed, match="cannot load the graph"):
        OnnxRuntimeSession(b"nothing", threads=1)
    session = OnnxRuntimeSession(teacher_graph(), threads=1)
    with pytest.raises(RuntimeFailed, match=r"failed on images \[2, 8, 8, 3\]"):
        session.run(pictures(2), ["logits"])
