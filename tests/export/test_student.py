"""A small net learns which colour channel is brightest, and is exported once for all tests."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.runtime.tensorrt.build import build
from edge_teacher.runtime.tensorrt.key import Options, profile_for
from export.checks.student import OnnxClassifier, check_parity, choose_canary
from export.checks.tensorrt import check_tensorrt, installed_tensorrt
from export.graph import InputSpec, UnsupportedNetwork
from export.quantise import Dialect, quantise
from export.student import (
    FileReport,
    StudentFiles,
    check_drop,
    export_student,
)

FP32, CPU, TENSORRT = "student.fp32.onnx", "student.int8.cpu.onnx", "student.int8.tensorrt.onnx"
CLASSES = ["red", "green", "blue"]
INPUT = InputSpec((16, 12), (0.5, 0.4, 0.45), (0.25, 0.2, 0.3))


class Net(nn.Module):
    """What students are made of: strided, depthwise and residual parts, ReLU6, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.wide(x + self.deep(x))
        return self.head(x.mean((2, 3)))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :3]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def photographs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8[count, 20, 18, 3] where the channel of the label is brighter by a little."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.normal(110, 40, (count, 20, 18, 3))
    images[np.arange(count), :, :, labels] += 12
    return images.clip(0, 255).astype(np.uint8), labels


def torch_logits(net: nn.Module, images: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype)
    resized = F.interpolate(pixels, INPUT.size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (INPUT.mean, INPUT.std))
    with torch.inference_mode():
        return copy.deepcopy(net).to(dtype).eval()((resized / 255 - mean) / std).numpy()


@pytest.fixture(scope="module")
def net() -> Net:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net().train()
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    images, labels = photographs(256, seed=1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (INPUT.mean, INPUT.std))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    inputs = (F.interpolate(pixels, INPUT.size, mode="bilinear") / 255 - mean) / std
    for _ in range(40):
        loss = F.cross_entropy(net(inputs), torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


@pytest.fixture(scope="module")
def exported(net: Net) -> StudentFiles:
    calibration, _ = photographs(100, seed=2)
    return export_student(net, INPUT, CLASSES, calibration, photographs(300, seed=3))


@pytest.fixture(scope="module")
def graphs(exported: StudentFiles) -> dict[str, onnx.GraphProto]:
    return {name: onnx.load_from_string(data).graph for name, data in exported.files.items()}


def constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in graph.initializer}


def stored_weights(graph: onnx.GraphProto) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{dequantised name: (integers, scales)} of every constant of rank 2 and up."""
    values = constants(graph)
    return {
        node.output[0]: (values[node.input[0]], values[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in values
        and values[node.input[0]].ndim > 1
    }


def test_every_file_takes_photographs_and_answers_logits(exported: StudentFiles) -> None:
    assert set(exported.files) == {FP32, CPU, TENSORRT}
    for data in exported.files.values():
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        (images,), (logits,) = model.graph.input, model.graph.output
        assert (images.name, logits.name) == ("images", "logits")
        assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
            *("N", "H", "W"),
            3,
        ]
        assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert {o.domain: o.version for o in model.opset_import}[""] == 18


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9)
)
def test_fp32_is_torch_at_any_size_and_batch(
    net: Net, exported: StudentFiles, n: int, height: int, width: int, seed: int
) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    expected = torch_logits(net, images, torch.float64)
    answered = OnnxClassifier(exported.files[FP32]).logits(images)
    assert answered.shape == (n, 3)
    np.testing.assert_allclose(answered, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [CPU, TENSORRT])
def test_preprocessing_and_logits_stay_float(graphs: dict[str, onnx.GraphProto], name: str) -> None:
    graph = graphs[name]
    producer = {o: n for n in graph.node for o in n.output}
    # The quantiser names its nodes after the tensor they stand on.
    front = [n for n in graph.node if n.name.startswith("input/") and "Linear" not in n.op_type]
    assert {n.op_type for n in front} >= {"Cast", "Resize", "Mul", "Add"}
    inputs = [i for n in front for i in n.input if i in producer]
    assert all(producer[i].op_type != "DequantizeLinear" for i in inputs)
    assert producer["logits"].op_type == "Gemm"
    # The first Q stands on the normalised pixels.
    first = next(n for n in graph.node if n.op_type == "QuantizeLinear")
    assert producer[first.input[0]] is front[-1]


@pytest.mark.parametrize(("name", "limit"), [(CPU, 64), (TENSORRT, 127)])
def test_weights_are_int8_per_output_channel(
    graphs: dict[str, onnx.GraphProto], name: str, limit: int
) -> None:
    weights = stored_weights(graphs[name])
    assert len(weights) == 4
    for values, scales in weights.values():
        assert values.dtype == np.int8
        assert scales.shape == (values.shape[0],)
        # The full range is used, and of the CPU dialect only seven bits: u8·s8 pairs must fit in
        # 16.
        assert np.abs(values.astype(int)).max() == limit


def test_cpu_dialect_has_unsigned_activations(graphs: dict[str, onnx.GraphProto]) -> None:
    values = constants(graphs[CPU])
    quantisers = [n for n in graphs[CPU].node if n.op_type == "QuantizeLinear"]
    assert quantisers
    assert {values[n.input[2]].dtype for n in quantisers} == {np.dtype(np.uint8)}


def test_tensorrt_dialect_is_symmetric_and_leaves_biases(
    graphs: dict[str, onnx.GraphProto],
) -> None:
    values = constants(graphs[TENSORRT])
    pairs = [
        n for n in graphs[TENSORRT].node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert pairs
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    dequantised = {n.output[0] for n in pairs if n.op_type == "DequantizeLinear"}
    weighted = [n for n in graphs[TENSORRT].node if n.op_type in ("Conv", "Gemm")]
    assert all(set(n.input[:2]) <= dequantised for n in weighted)
    assert all(n.input[2] not in dequantised for n in weighted if len(n.input) > 2)


def test_tensorrt_takes_its_file_and_refuses_the_cpu_one(exported: StudentFiles) -> None:
    tensorrt = installed_tensorrt()
    if tensorrt is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu12==1.7.1.116")
    verdict = exported.report.tensorrt
    assert (verdict.checked, verdict.accepted) == (True, True), verdict.detail
    # As a device builds it: any batch, any size of picture.
    built = build(
        tensorrt,
        exported.files[TENSORRT],
        profile=profile_for((20, 18)),
        options=Options(level=0),
    )
    assert built.engine
    refused = check_tensorrt(exported.files[CPU], {"images": (4, 20, 18, 3)}, tensorrt)
    assert refused.accepted is False
    assert "DequantizeLinear" in refused.detail


def test_a_missing_tensorrt_is_said_and_not_passed_over(exported: StudentFiles) -> None:
    verdict = check_tensorrt(exported.files[TENSORRT], {"images": (4, 20, 18, 3)}, None)
    assert (verdict.checked, verdict.accepted) == (False, None)
    assert "pip install" in verdict.detail


def test_report_measures_what_the_files_do(net: Net, exported: StudentFiles) -> None:
    images, labels = photographs(300, seed=3)
    report = exported.report
    fp32 = torch_logits(net, images, torch.float32).argmax(1)
    for name, data in exported.files.items():
        top1 = OnnxClassifier(data).logits(images).argmax(1)
        assert report.files[name].bytes == len(data)
        assert report.files[name].accuracy == pytest.approx((top1 == labels).mean())
        assert report.files[name].agreement == pytest.approx((top1 == fp32).mean())
    assert report.files[FP32].accuracy > 0.9
    assert min(f.agreement for f in report.files.values()) > 0.97
    assert (report.calibration_images, report.holdout_images) == (100, 300)
    assert 0 < report.parity_error < 1e-5


def test_canary_recognises_the_student_and_no_other(exported: StudentFiles) -> None:
    canary = exported.canary
    assert canary.images.shape == (8, 20, 18, 3)
    assert set(canary.answers) == {0, 1, 2}
    for name, data in exported.files.items():
        answered = OnnxClassifier(data).logits(canary.images)
        assert np.abs(answered - canary.logits[name]).max() <= canary.tolerance[name]
        assert (answered.argmax(1) == canary.answers).all()
    other = onnx.load_from_string(exported.files[CPU])
    multiply = next(
        n for n in other.graph.node if n.name.startswith("input/") and n.op_type == "Mul"
    )
    scale = next(i for i in other.graph.initializer if i.name == multiply.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.2, scale.name))
    answered = OnnxClassifier(other.SerializeToString()).logits(canary.images)
    assert np.abs(answered - canary.logits[CPU]).max() > canary.tolerance[CPU]


def test_canary_needs_files_that_agree(exported: StudentFiles) -> None:
    opposite = onnx.load_from_string(exported.files[FP32])
    for initializer in opposite.graph.initializer:
        if initializer.name in ("head.weight", "head.bias"):
            flipped = -numpy_helper.to_array(initializer)
            initializer.CopyFrom(numpy_helper.from_array(flipped, initializer.name))
    models = {FP32: exported.files[FP32], "opposite.onnx": opposite.SerializeToString()}
    with pytest.raises(CheckFailed, match=r"opposite\.onnx"):
        choose_canary(models, photographs(40, seed=4)[0])


def test_same_student_same_bytes_and_nothing_of_its_source(
    net: Net, exported: StudentFiles
) -> None:
    before = copy.deepcopy(net.state_dict())
    again = export_student(net, INPUT, CLASSES, photographs(100, seed=2)[0])
    assert again.files == exported.files
    assert again.report.files[FP32].accuracy is None
    for data in exported.files.values():
        for trace in (str(Path(__file__).parent), "torch.nn", Net.__name__ + "/"):
            assert trace.encode() not in data
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_parity_notices_another_network(net: Net, exported: StudentFiles) -> None:
    other = copy.deepcopy(net).eval()
    with torch.no_grad():
        other.head.bias[0] += 0.01
    with pytest.raises(CheckFailed, match="differs from the trained student"):
        check_parity(other, INPUT, exported.files[FP32])


def test_too_large_a_drop_is_refused() -> None:
    reports = {
        name: FileReport(bytes=1, accuracy=accuracy, agreement=0.9)
        for name, accuracy in ((FP32, 0.55), (CPU, 0.545), (TENSORRT, 0.51))
    }
    check_drop(reports, largest_drop=0.05)
    with pytest.raises(CheckFailed, match=r"tensorrt\.onnx has 51\.0% accuracy .* FP32 55\.0%"):
        check_drop(reports, largest_drop=0.01)


def test_a_network_with_one_fixed_batch_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(2, 3\), which is not \(3, 3\)"):
        export_student(FixedBatch(), INPUT, CLASSES, photographs(4, seed=2)[0])


def test_a_network_that_branches_on_values_is_refused() -> None:
    with pytest.raises(CheckFailed, match="cannot export"):
        export_student(Branching(), INPUT, CLASSES, photographs(4, seed=2)[0])


def test_a_graph_with_nothing_to_quantise_is_refused() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (uint8[N, H, W, 3] images) => (float[N, 3] logits) <int64[2] axes = {1, 2}> {
            pixels = Cast<to = 1>(images)
            logits = ReduceMean<keepdims = 0>(pixels, axes)
        }"""
    )
    with pytest.raises(CheckFailed, match="no quantised node"):
        quantise(model, photographs(4, seed=2)[0], Dialect.TENSORRT)


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b"]}, r"not \(3, 2\)"),
        ({"calibration": IMAGES.astype(np.float32)}, "calibration images are float32"),
        ({"calibration": IMAGES[:0]}, "N at least 1"),
        ({"calibration": IMAGES.transpose(0, 3, 1, 2)}, r"\[4, 3, 8, 8\]"),
        ({"holdout": (IMAGES, np.zeros(3, int))}, "4 images and labels"),
        ({"holdout": (IMAGES, np.full(4, 3))}, "outside 0 to 2"),
        ({"largest_drop": 0.01}, "needs a labelled holdout"),
    ],
)
def test_what_does_not_fit_is_named(net: Net, changes: dict[str, object], message: str) -> None:
    arguments = {"classes": CLASSES, "calibration": IMAGES} | changes
    with pytest.raises(UsageError, match=message):
        export_student(net, INPUT, **arguments)


@pytest.mark.parametrize(
    ("size", "mean", "std"),
    [
        ((0, 32), (0.5,) * 3, (0.2,) * 3),
        ((32, 32), (0.5, 0.5), (0.2,) * 3),
        ((32, 32), (0.5,) * 3, (0.2, 0.0, 0.2)),
        ((32, 32), (float("nan"), 0.5, 0.5), (0.2,) * 3),
    ],
)
def test_an_impossible_input_is_refused(size: tuple, mean: tuple, std: tuple) -> None:
    with pytest.raises(UnsupportedNetwork):
        InputSpec(size, mean, std)
