"""Reverse-mode differentiation over ONNX: saliency for any vision network, without autograd.

    teacher = build_teacher_graph(onnx.load("net.onnx"), InputSpec(size=(224, 224)), taps={"last": "relu_48"})

The reverse pass (`gradients`) walks the network's own graph backwards; each operator family has one rule in
`rules/`, listed by `coverage()`; what a rule writes are plain nodes of opset 18.
"""

from export.graph.build import build_teacher_graph
from export.graph.errors import UnsupportedNetwork, UnsupportedOperator
from export.graph.gradient import gradients
from export.graph.prepare import prepare
from export.graph.registry import coverage
from export.graph.saliency import Kind, MapLayout, infer_layout
from export.graph.target import Target, find_logits
from export.graph.wrap import InputSpec

__all__ = [
    "InputSpec",
    "Kind",
    "MapLayout",
    "Target",
    "UnsupportedNetwork",
    "UnsupportedOperator",
    "build_teacher_graph",
    "coverage",
    "find_logits",
    "gradients",
    "infer_layout",
    "prepare",
]
