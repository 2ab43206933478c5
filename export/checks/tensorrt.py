"""Will TensorRT take this graph? Asked of NVIDIA's own parser and builder, which need no GPU.

`tensorrt_rtx` is the freely installable member of the family. Its engines are for desktop GPUs, so
it is a gate for graphs and not a way to make a Jetson's engine.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import msgspec

TENSORRT_RTX = "tensorrt-rtx-cu12==1.7.1.116"


class TensorRtVerdict(msgspec.Struct, frozen=True):
    """What TensorRT said about one ONNX file.

    Attributes:
        checked: False when no TensorRT was installed; then nothing is known.
        accepted: parsed and built an engine; None when not checked.
        version: which TensorRT was asked.
        detail: the parser's or builder's own words, or what to install.
    """

    checked: bool
    accepted: bool | None
    version: str | None
    detail: str


def installed_tensorrt() -> ModuleType | None:
    """`tensorrt_rtx` if this Python has it."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError:
        return None


def check_tensorrt(
    model: bytes, largest: dict[str, tuple[int, ...]], tensorrt: ModuleType | None
) -> TensorRtVerdict:
    """Parse `model` and build an engine for inputs from all-ones dynamic axes up to `largest`.

    Args:
        model: a serialised ONNX file.
        largest: for each graph input, its shape at the upper end of the optimisation profile.
        tensorrt: the module to ask (10.x, 11.x and RTX share the calls used here), or None.
    """
    if tensorrt is None:
        return TensorRtVerdict(
            checked=False,
            accepted=None,
            version=None,
            detail=f"not checked: TensorRT is not installed (pip install {TENSORRT_RTX})",
        )
    log = _collecting_logger(tensorrt)
    builder = tensorrt.Builder(log)
    flag = tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = tensorrt.OnnxParser(network, log)
    version = f"{tensorrt.__name__} {tensorrt.__version__}"
    if not parser.parse(model):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        return TensorRtVerdict(True, False, version, f"the parser refused it: {said}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        upper = largest[tensor.name]
        lower = tuple(
            1 if axis == -1 else size for axis, size in zip(tensor.shape, upper, strict=True)
        )
        profile.set_shape(tensor.name, lower, upper, upper)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        said = "; ".join(log.messages[-3:]) or "no reason given"
        return TensorRtVerdict(True, False, version, f"the builder refused it: {said}")
    return TensorRtVerdict(True, True, version, f"parsed and built ({engine.nbytes:,} bytes)")


def _collecting_logger(tensorrt: ModuleType) -> Any:
    """A logger that keeps errors and warnings instead of printing them."""

    class Collecting(tensorrt.ILogger):  # type: ignore[name-defined,misc]  # known only at run time
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    return Collecting()
