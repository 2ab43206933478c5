"""Where channels and pixels are, and which axis holds the classes: what a shape alone does not say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_teacher.contract.errors import UsageError
from export.checks.parity import check_derivative
from export.graph import (
    InputSpec,
    Target,
    UnsupportedNetwork,
    build_teacher_graph,
    find_logits,
    prepare,
)
from export.graph.layout import layout_of
from export.graph.network import session
from export.graph.target import resolve, settle
from export.inspect import inspect
from tests.export.graph.differentiate import model_of, random

SPEC = InputSpec(size=(32, 32))


def exported(net: nn.Module, size: tuple[int, int] = (32, 32)) -> onnx.ModelProto:
    from export.torch_to_onnx import torch_to_onnx

    torch.manual_seed(3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return torch_to_onnx(net.eval(), (3, *size), ["scores"])


def test_what_a_convolution_makes_has_its_channels_first_whatever_its_shape() -> None:
    """[N, 32, 32, 64] on a square image looks like channels last; a Conv made it."""
    weights = {"w": random(32, 3, 3, 3)}
    model = model_of(
        "c = Conv<pads=[1,1,1,1], strides=[1,1]>(x, w) y = Relu(c)", (3, 32, 64), weights
    )
    network = prepare(model, InputSpec(size=(32, 64)))
    layout = layout_of(network, "y", (32, 32))
    assert (layout.axes, layout.size) == ("NCHW", (32, 64))


def test_a_sequence_that_was_never_a_grid_is_no_map() -> None:
    """24 steps of a text line are not 3 x 8 pixels."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, (32, 4), (32, 4))
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps = torch.tanh(self.conv(x).squeeze(2).transpose(1, 2))
            return self.head(steps)

    model = exported(Line(), (32, 96))
    network = prepare(model, InputSpec(size=(32, 96)))
    tokens = [n for n, v in network.values.items() if [d.size for d in v.shape] == [1, 24, 8]]
    assert tokens
    for name in tokens:
        with pytest.raises(UnsupportedNetwork, match="it is no grid"):
            layout_of(network, name, (32, 96))


def test_square_maps_with_classes_last() -> None:
    assert resolve((2, 8, 8, 5), Target()).class_axis == 3
    assert resolve((2, 5, 8, 8), Target()).class_axis == 1
    assert resolve((2, 5, 8, 12), Target()).class_axis == 1
    assert resolve((2, 8, 8, 5), Target(class_axis=1)).class_axis == 1


def test_a_class_of_a_detector_needs_its_axis() -> None:
    """[N, 5, 40]: forty boxes of five classes, or five of forty: the wrong one would go unnoticed."""
    body = "c = Conv(x, w) r = Reshape(c, s) y = Sigmoid(r)"
    model = model_of(body, (3, 8, 5), {
        "w": random(5, 3, 1, 1), "s": np.asarray([0, 5, 40], np.int64),
    })  # fmt: skip
    network = prepare(model, InputSpec(size=(8, 5)))
    with pytest.raises(UnsupportedNetwork, match="--class-axis"):
        settle(network, "r", Target(class_index=2))
    assert settle(network, "r", Target(class_index=2, class_axis=1)).reduction == "max"
    assert settle(network, "r", Target()).reduction == "max"


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.head(self.body(x).mean((2, 3))))


def test_a_binary_head_has_one_score() -> None:
    model = exported(Binary())
    network = prepare(model, SPEC)
    scores = find_logits(network, ["scores"])
    assert [dim.size for dim in network.value(scores).shape] == [1, 1]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert check_derivative(model, SPEC, images).passed


def test_a_uint8_input_keeps_the_fractions_of_resized_pixels() -> None:
    body = "f = Cast<to=1>(x) m = ReduceMean<keepdims=0>(f, a) y = MatMul(m, w)"
    model = model_of(body, (3, 8, 8), {"a": np.asarray([2, 3], np.int64), "w": random(3, 4)})
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    teacher = build_teacher_graph(
        model,
        InputSpec(size=(8, 8), scale=1.0),
        taps={},
        kind="input_gradient",
        publish_logits=True,
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 11, 13, 3), dtype=np.uint8)
    (got,) = session(teacher).run(["logits"], {"images": images})
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    x = nn.functional.interpolate(x, (8, 8), mode="bilinear", align_corners=False)
    wanted = x.mean((2, 3)).numpy() @ random(3, 4).astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_suggested_command_can_be_pasted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import shlex

    path = tmp_path / "a network; with $(odd) name.onnx"
    onnx.save(exported(Binary()), path)
    words = shlex.split(inspect(path).command)
    assert words[words.index("--onnx") + 1] == str(path)
    assert words[words.index("--out") + 1] == f"{path.stem}.fedsa"


def test_errors_of_the_compiler_are_the_user_s() -> None:
    assert issubclass(UnsupportedNetwork, UsageError)


def test_boxes_and_scores_cut_from_one_squash_are_not_taken_for_classes() -> None:
    """YOLOv5's export: [N, boxes, 4 + K], the boxes computed from the same sigmoid as the scores."""
    body = """
        c = Conv(x, w) f = Reshape(c, s) t = Transpose<perm=[0, 2, 1]>(f) q = Sigmoid(t)
        b = Slice(q, zero, four, last) k = Slice(q, four, nine, last) two = Mul(b, b)
        y = Concat<axis=2>(two, k)
    """
    ints = {"s": [0, 9, 16], "zero": [0], "four": [4], "nine": [9], "last": [2]}
    weights = {name: np.asarray(value, np.int64) for name, value in ints.items()}
    model = model_of(body, (3, 4, 4), {"w": random(9, 3, 1, 1), **weights})
    network = prepare(model, InputSpec(size=(4, 4)))
    with pytest.raises(UnsupportedNetwork, match="joins boxes and scores"):
        find_logits(network, ["y"])
