"""The checks made at export, on networks that pass and on ones that must not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from edge_teacher.contract.errors import CheckFailed
from export.checks.autograd import UnknownOperator, evaluate
from export.checks.fp16 import check_half, to_half
from export.checks.parity import (
    BatchReport,
    DerivativeReport,
    check_batches,
    check_derivative,
    require,
)
from export.checks.tensorrt import check_tensorrt, installed_tensorrt
from export.graph import InputSpec, Target, build_teacher_graph
from export.graph.network import session
from tests.export.graph.differentiate import model_of, random

SPEC = InputSpec(size=(8, 8), mean=(0.5,), std=(0.25,))
BODY = """
    c = Conv<pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    g = GlobalAveragePool(p)
    f = Flatten(g)
    y = Gemm<transB=1>(f, v)
"""
WEIGHTS = {"w": random(6, 3, 3, 3), "v": random(5, 6)}


def network(body: str = BODY) -> onnx.ModelProto:
    return model_of(body, (3, 8, 8), WEIGHTS)


def photographs(count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("wrt", [None, "r", "p"])
@pytest.mark.parametrize("target", [Target(), Target(class_index=2)])
def test_a_right_derivative_passes(wrt: str | None, target: Target) -> None:
    report = check_derivative(network(), SPEC, photographs(), wrt=wrt, target=target)
    assert report.judge == "float64 autograd"
    assert report.gradient_error <= 1e-5
    assert report.passed


def test_an_operator_the_judge_lacks_falls_back_to_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from export.checks import torch_operators

    monkeypatch.delitem(torch_operators.OPERATORS, "MaxPool")
    with pytest.raises(UnknownOperator, match="MaxPool"):
        evaluate(network(), {"x": torch.zeros(1, 3, 8, 8)}, ["p"])
    report = check_derivative(network(), SPEC, photographs(), wrt="r")
    assert report.judge == "directional differences"
    assert report.logits_error is None
    assert report.passed


def test_a_form_of_an_operator_the_judge_lacks_is_named() -> None:
    body = 'y = ScatterND<reduction="add">(x, i, u)'
    weights = {"i": np.asarray([[0]], np.int64), "u": random(1, 3, 8, 8)}
    with pytest.raises(UnknownOperator, match=r"ScatterND .* with a reduction"):
        evaluate(model_of(body, (3, 8, 8), weights), {"x": torch.zeros(1, 3, 8, 8)}, ["y"])


def test_differences_notice_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is twice too large fails under both judges."""
    from export.checks import torch_operators
    from export.graph import registry

    right = registry._RULES["GlobalAveragePool"]

    def twice(step: registry.Step) -> None:
        right(step)
        step.given = [(name, step.ops.mul(value, 2)) for name, value in step.given]

    monkeypatch.setitem(registry._RULES, "GlobalAveragePool", twice)
    exact = check_derivative(network(), SPEC, photographs(), wrt="r")
    assert not exact.passed
    monkeypatch.delitem(torch_operators.OPERATORS, "MaxPool")
    assert not check_derivative(network(), SPEC, photographs(), wrt="r").passed


def test_batches_agree_and_maps_vary() -> None:
    teacher = build_teacher_graph(network(), SPEC, taps={"last": "p"})
    report = check_batches(teacher, photographs())
    assert report.batches == (1, 2, 3, 17)
    assert report.worst_difference < 1e-5
    assert report.maps_vary


def test_what_must_not_ship_is_refused_with_a_sentence() -> None:
    good = DerivativeReport("float64 autograd", 4, 1e-7, 1e-7)
    batches = BatchReport((1, 2, 3, 17), 1e-6, 0, True)
    require(good, batches)
    with pytest.raises(CheckFailed, match="gradient differs"):
        require(DerivativeReport("float64 autograd", 4, 1e-3, 1e-7), batches)
    with pytest.raises(CheckFailed, match="mixes the images"):
        require(good, BatchReport((1, 2, 3, 17), 0.1, 0, True))
    with pytest.raises(CheckFailed, match="same saliency map"):
        require(good, BatchReport((1, 2, 3, 17), 0.0, 0, False))


def test_the_half_precision_copy_keeps_its_types_and_agrees() -> None:
    teacher = build_teacher_graph(network(), SPEC, taps={"last": "p"}, publish_logits=True)
    half = to_half(teacher)
    assert {tensor.data_type for tensor in half.graph.initializer} >= {onnx.TensorProto.FLOAT16}
    outputs = session(half).run(None, {"images": photographs()})
    assert all(output.dtype == np.float32 for output in outputs)
    report = check_half(teacher, photographs())
    assert report.other_class == 0
    assert report.worst_cosine is not None
    assert report.worst_cosine >= 0.99
    assert report.agrees
    assert report.warning is None


def test_an_image_whose_class_half_precision_changes_is_counted_apart() -> None:
    """Two classes whose scores differ by less than float16 can tell: the first of equals wins."""
    model = network()
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "v")
    rows = np.tile(numpy_helper.to_array(head)[:1], (5, 1))
    rows[1:] *= 1 + 1e-6 * np.sign(rows[:1]) * np.arange(1, 5)[:, None]
    head.CopyFrom(numpy_helper.from_array(rows.astype(np.float32), "v"))
    report = check_half(build_teacher_graph(model, SPEC, taps={"last": "p"}), photographs())
    assert report.other_class == report.images
    assert report.worst_cosine is None
    assert "of no image" in (report.warning or "")


def test_half_precision_that_overflows_is_warned_about() -> None:
    """Activations of a million do not fit in float16."""
    body = BODY.replace("r = Relu(c)", "s = Mul(c, big) r = Relu(s)")
    model = network(body)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e7), "big"))
    report = check_half(build_teacher_graph(model, SPEC, taps={"last": "r"}), photographs())
    assert not report.agrees
    assert "float32" in (report.warning or "")


@pytest.mark.parametrize("kind", ["gradcam", "input_gradient", "gradient_times_input", "eigencam"])
def test_tensorrt_parses_and_builds_every_kind(kind: str) -> None:
    tensorrt = installed_tensorrt()
    if tensorrt is None:
        pytest.skip("tensorrt_rtx is not installed")
    teacher = build_teacher_graph(network(), SPEC, taps={"last": "p"}, kind=kind)
    verdict = check_tensorrt(teacher.SerializeToString(), {"images": (4, 8, 8, 3)}, tensorrt)
    assert verdict.accepted, verdict.detail


def test_the_judge_names_the_operator_it_lacks() -> None:
    graph = helper.make_graph([helper.make_node("Hardmax", ["x"], ["y"], name="odd")], "g", [], [])
    with pytest.raises(UnknownOperator, match="Hardmax at node 'odd'"):
        evaluate(helper.make_model(graph), {"x": torch.zeros(2, 3)}, ["y"])
