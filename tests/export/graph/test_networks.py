"""Random small networks: branches, joins, changes of resolution and normalisation in any order.

The zoo has the wirings people draw; these have the ones nobody would. Judged as an owner's network is, against
float64 autograd on the branches float32 took.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.checks.parity import check_derivative
from export.graph import InputSpec
from tests.export.graph.differentiate import random
from tests.export.graph.test_geometries import QUICK

SIDE, CHANNELS = 8, 4
SPEC = InputSpec(size=(SIDE, SIDE), mean=(0.5,), std=(0.25,))
UNARY = [
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Selu", "Softplus", "Erf", "Abs",
    "Mish", "Softsign", "Neg", "Identity",
]  # fmt: skip
BINARY = ["Add", "Sub", "Mul", "Max", "Min", "Gate", "Concat"]
STRUCTURE = [
    "Conv", "Depthwise", "Pointwise", "MaxPool", "AveragePool", "Down and up", "Norm", "LRN", "Softmax",
    "Tokens", "Shuffle", "Pad and slice", "Split",
]  # fmt: skip


class Drawing:
    """Maps of CHANNELS x SIDE x SIDE; every step reads one or two that exist and adds one."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list = []
        self.stored: list = []
        self.maps = ["x3"]
        self.op("Conv", ["x", self.weight(CHANNELS, 3, 3, 3)], "x3", pads=[1, 1, 1, 1])

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.stored)}"
        scale = np.float32(1 / np.sqrt(max(1, np.prod(shape[1:]))))
        self.stored.append(
            numpy_helper.from_array(random(*shape, seed=len(self.stored)) * scale, name)
        )
        return name

    def ints(self, *numbers: int) -> str:
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(numbers, np.int64), name))
        return name

    def op(self, kind: str, inputs: list[str], out: str | None = None, **attributes: object) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def pick(self) -> str:
        return self.draw(st.sampled_from(self.maps[-4:]))

    def step(self) -> None:
        family = self.draw(st.sampled_from(["unary", "binary", "structure", "structure"]))
        if family == "unary":
            self.maps.append(self.op(self.draw(st.sampled_from(UNARY)), [self.pick()]))
        elif family == "binary":
            kind = self.draw(st.sampled_from(BINARY))
            self.maps.append(self.joined(kind, self.pick(), self.pick()))
        else:
            kind = self.draw(st.sampled_from(STRUCTURE))
            self.maps.append(self.structure(kind, self.pick()))

    def joined(self, kind: str, a: str, b: str) -> str:
        if kind == "Gate":  # one number per channel
            mean = self.op("GlobalAveragePool", [b])
            return self.op("Mul", [a, self.op("Sigmoid", [mean])])
        if kind == "Concat":
            both = self.op("Concat", [a, b], axis=1)
            return self.op("Conv", [both, self.weight(CHANNELS, 2 * CHANNELS, 1, 1)])
        return self.op(kind, [a, b])

    def structure(self, kind: str, x: str) -> str:
        c, s = CHANNELS, SIDE
        match kind:
            case "Conv":
                return self.op(
                    "Conv", [x, self.weight(c, c, 3, 3), self.weight(c)], pads=[2, 2, 2, 2], dilations=[2, 2]
                )  # fmt: skip
            case "Depthwise":
                return self.op("Conv", [x, self.weight(c, 1, 3, 3)], pads=[1, 1, 1, 1], group=c)
            case "Pointwise":
                return self.op("Conv", [x, self.weight(c, c, 1, 1)])
            case "MaxPool" | "AveragePool":
                return self.op(kind, [x], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            case "Down and up":
                down = self.op(
                    "Conv", [x, self.weight(c, c, 3, 3)], strides=[2, 2], pads=[1, 1, 1, 1]
                )
                return self.op("ConvTranspose", [down, self.weight(c, c, 2, 2)], strides=[2, 2])
            case "Norm":
                return self.op("InstanceNormalization", [x, self.weight(c), self.weight(c)])
            case "LRN":
                return self.op("LRN", [x], size=3, alpha=0.3)
            case "Softmax":
                return self.op("Softmax", [x], axis=1)
            case "Tokens":
                flat = self.op("Reshape", [x, self.ints(0, c, s * s)])
                tokens = self.op("Transpose", [flat], perm=[0, 2, 1])
                mixed = self.op("MatMul", [tokens, self.weight(c, c)])
                back = self.op("Transpose", [mixed], perm=[0, 2, 1])
                return self.op("Reshape", [back, self.ints(0, c, s, s)])
            case "Shuffle":
                groups = self.op("Reshape", [x, self.ints(0, 2, c // 2, s, s)])
                swapped = self.op("Transpose", [groups], perm=[0, 2, 1, 3, 4])
                return self.op("Reshape", [swapped, self.ints(0, c, s, s)])
            case "Pad and slice":
                padded = self.op("Pad", [x, self.ints(0, 0, 1, 2, 0, 0, 1, 0)], mode="reflect")
                bounds = [self.ints(0, 1), self.ints(s, s + 1), self.ints(2, 3)]
                return self.op("Slice", [padded, *bounds])
            case _:
                halves = [f"h{len(self.nodes)}", f"k{len(self.nodes)}"]
                self.nodes.append(helper.make_node("Split", [x], halves, axis=1, num_outputs=2))
                return self.op("Concat", [halves[1], halves[0]], axis=1)

    def model(self) -> ModelProto:
        last = self.maps[-1]
        mean = self.op("GlobalAveragePool", [last])
        most = self.op("GlobalMaxPool", [self.pick()])
        features = self.op("Concat", [mean, most], axis=1)
        flat = self.op("Flatten", [features])
        self.op("Gemm", [flat, self.weight(2 * CHANNELS, 5)], "logits")
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
            self.stored,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@settings(QUICK, max_examples=60)
@given(st.data())
def test_random_networks(data: st.DataObject) -> None:
    drawing = Drawing(data.draw)
    for _ in range(data.draw(st.integers(3, 14))):
        drawing.step()
    images = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    report = check_derivative(drawing.model(), SPEC, images)
    assert report.judge == "float64 autograd"
    assert report.passed, report
