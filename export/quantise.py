"""A float ONNX classifier in the two INT8 dialects that runtimes accept, from one calibration set.

The fast dialect of ONNX Runtime on a CPU (unsigned activations with a zero point, INT32 biases) is
refused by TensorRT's parser, and the one TensorRT takes (signed, symmetric, float biases) is slower
than FP32 on a CPU. So a student travels as one file per runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edge_teacher.contract.errors import CheckFailed
from export.input_graph import IMAGES, INPUT_PREFIX

CALIBRATION_BATCH = 64

# Tells the quantiser that folding and shape inference are done; without, it logs advice to do them.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


class Dialect(Enum):
    """Which runtime the Q/DQ pairs are written for; the value is part of the file's name."""

    CPU = "cpu"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class _Recipe:
    activations: QuantType
    op_types: list[str] | None
    seven_bit_weights: bool
    options: dict[str, Any] = field(default_factory=dict)


_RECIPES = {
    # Seven-bit weights: without VNNI, AVX2 adds pairs of u8·s8 products in a saturating 16-bit lane,
    # and only |weight| <= 64 keeps 2·255·64 below 32,768. Measured on such a CPU, a residual net of
    # 0.35 M parameters, CIFAR-10: top-1 as FP32's on 98.6 % of 2,000 images (94.5 % with eight bits,
    # logits off by up to 2.4 of a spread of 23), accuracy 69.5 % (68.9 %; FP32 69.6 %). It also makes
    # AVX2, VNNI and Arm devices answer alike. `session.x64quantprecision` avoids the saturation too,
    # but only where whoever opens the session knows to set it.
    Dialect.CPU: _Recipe(QuantType.QUInt8, None, seven_bit_weights=True),
    # Only what feeds a weighted op is quantised: TensorRT then fuses convolution, bias, ReLU and
    # the next Q into one INT8 kernel, and its parser never meets a Q/DQ pair on a bias (refused) or
    # on a constant.
    Dialect.TENSORRT: _Recipe(
        QuantType.QInt8,
        ["Conv", "ConvTranspose", "Gemm", "MatMul"],
        seven_bit_weights=False,
        options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "ConvTranspose", "Gemm", "MatMul"],
        },
    ),
}


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """The calibration images, a batch at a time, as the calibrator wants to be fed."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._batches: Iterator[NDArray[np.uint8]] = iter(
            images[start : start + CALIBRATION_BATCH]
            for start in range(0, len(images), CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGES: batch}


def quantise(
    model: onnx.ModelProto, calibration: NDArray[np.uint8], dialect: Dialect
) -> onnx.ModelProto:
    """Insert Q/DQ pairs with ranges (minimum and maximum) seen on `calibration`.

    Args:
        model: FP32, input `images: uint8[N, H, W, 3]`, one float output. Left as it was.
        calibration: uint8[N, H, W, 3], the kind of images the device will see.
        dialect: whose Q/DQ to write.

    Weights are INT8 per output channel in both dialects. What comes before the first weighted op
    (resizing, normalising) stays float, and so do the logits: eight bits would make ties of close
    classes.

    Raises:
        CheckFailed: no node took a Q/DQ pair; the result would be FP32 under another name.
    """
    recipe = _RECIPES[dialect]
    source = onnx.ModelProto()
    source.CopyFrom(model)
    source.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    with tempfile.TemporaryDirectory(prefix="fedsa-quantise-") as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_static(
            source,
            str(path),
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod.MinMax,
            activation_type=recipe.activations,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=recipe.seven_bit_weights,
            op_types_to_quantize=recipe.op_types,
            nodes_to_exclude=[n.name for n in model.graph.node if n.name.startswith(INPUT_PREFIX)],
            extra_options=recipe.options,
        )
        quantised = onnx.load(path)
    _keep_outputs_float(quantised.graph)
    if not any(node.op_type == "DequantizeLinear" for node in quantised.graph.node):
        raise CheckFailed(
            f"the {dialect.value} INT8 file has no quantised node: the student has no Conv, Gemm "
            "or MatMul with constant weights; deploy student.fp32.onnx instead"
        )
    del quantised.metadata_props[:]
    return quantised


def _keep_outputs_float(graph: onnx.GraphProto) -> None:
    """Take the last Q/DQ pair away from every graph output: DQ(Q(x)) -> x.

    And from what a resizing at the end is given: logits of eight bits would be ties before they are
    enlarged.
    """
    for output in graph.output:
        name = output.name
        while True:
            _bypass(graph, name)
            node = next((n for n in graph.node if name in n.output), None)
            if node is None or node.op_type != "Resize":
                break
            name = node.input[0]
    used = {name for node in graph.node for name in node.input}
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)


def _bypass(graph: onnx.GraphProto, name: str) -> None:
    """If `name` is DQ(Q(x)) and nothing else reads x, x takes its name."""
    producer = {made: node for node in graph.node for made in node.output}
    dequantise = producer.get(name)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return
    quantise_node = producer.get(dequantise.input[0])
    if quantise_node is None or quantise_node.op_type != "QuantizeLinear":
        return
    inner = quantise_node.input[0]
    others = [n for n in graph.node if n is not quantise_node and inner in n.input]
    if inner not in producer or others:
        return
    source = producer[inner]
    source.output[list(source.output).index(inner)] = name
    graph.node.remove(dequantise)
    graph.node.remove(quantise_node)
