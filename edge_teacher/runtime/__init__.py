"""Executing a graph: one Session interface, chosen by what the device has and what it measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_teacher.runtime.choice import dialects, open_session
from edge_teacher.runtime.live import LiveSession
from edge_teacher.runtime.model import Model
from edge_teacher.runtime.session import Session, run_in_batches

if TYPE_CHECKING:
    from edge_teacher.runtime.onnxruntime import OnnxRuntimeSession

__all__ = [
    "LiveSession",
    "Model",
    "OnnxRuntimeSession",
    "Session",
    "dialects",
    "open_session",
    "run_in_batches",
]


def __getattr__(name: str) -> Any:
    # A Jetson may have TensorRT and no ONNX Runtime: importing this package must not need it.
    if name == "OnnxRuntimeSession":
        from edge_teacher.runtime.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
