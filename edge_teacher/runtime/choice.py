"""The one way a model is opened, by the agent and by `edge-teacher check`: choice by measurement."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.memory import resident_bytes
from edge_teacher.runtime.live import LiveSession
from edge_teacher.runtime.machine import Machine, driver_missing, find_machine
from edge_teacher.runtime.model import CPU_DIALECTS, GPU_DIALECTS, Model
from edge_teacher.runtime.opened import Found
from edge_teacher.runtime.session import Session
from edge_teacher.runtime.worker import Worker


def _nobody() -> None:
    pass


def open_session(
    model: Model,
    *,
    threads: int,
    engines: Path | None = None,
    changed: Callable[[], None] = _nobody,
    wait: bool = False,
    find: Callable[[], Machine] = find_machine,
) -> LiveSession:
    """A session for `model` that answers at once on the CPU, and better once that has proved itself.

    engines: the folder for TensorRT's engines, None to forget them. changed: called, on any thread, when
    `info` says something new. wait: try everything first, the CPU's time too (`edge-teacher check`). Without
    ONNX Runtime it waits for an engine. Raises CheckFailed if nothing here executes the model.
    """
    worker = Worker("runtime")
    started, resident = time.monotonic(), resident_bytes()
    base = _base(model, threads)
    live = LiveSession(
        model,
        base,
        worker,
        changed=changed,
        base_load_s=time.monotonic() - started,
        resident_before=resident,
    )

    def search() -> Found:
        machine = find()
        if machine.cuda is None:
            return Found([], machine.absent)
        # Everything about TensorRT is read only where there is a GPU: a start is waited for.
        from edge_teacher.runtime.candidates import candidates

        found = candidates(model, machine, threads=threads, engines=engines, worker=worker)
        gpu = machine.cuda.gpu
        return Found(
            found, machine.absent, f"{gpu.name} ({gpu.architecture})", machine.cuda.free_bytes
        )

    # Without a driver there is nothing to try: what is missing is known at once.
    if wait or base is None or (find is find_machine and driver_missing()):
        live.search(search, measure_base=wait)
    else:
        worker.submit(lambda: live.search(search))
    if base is None and not live.answers:
        reasons = "; ".join(f"{name}: {why}" for name, why in live.why_not.items())
        raise CheckFailed(f"nothing on this machine executes {model.name} ({reasons})")
    return live


def _base(model: Model, threads: int) -> Session | None:
    """ONNX Runtime on the CPU. None where it is not installed; the machine's list says so."""
    try:
        from edge_teacher.runtime.onnxruntime import OnnxRuntimeSession
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        return None
    dialect = model.first(CPU_DIALECTS)
    session = OnnxRuntimeSession(
        model.graphs[dialect], threads=threads, name=model.name, precision=dialect
    )
    model.accept(session, dialect)
    return session


def dialects() -> tuple[str, ...]:
    """Graphs that this device can begin with, best first: a student must come as one of them."""
    return CPU_DIALECTS if importlib.util.find_spec("onnxruntime") else GPU_DIALECTS
