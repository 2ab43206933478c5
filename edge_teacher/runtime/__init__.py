"""Executing a graph: one Session interface, chosen by what the device has."""

from edge_teacher.runtime.onnxruntime import OnnxRuntimeSession
from edge_teacher.runtime.session import Session, run_in_batches

__all__ = ["OnnxRuntimeSession", "Session", "run_in_batches"]
