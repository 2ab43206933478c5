"""ONNX Runtime: on the CPU everywhere, on a GPU through the execution providers it was built with."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.contract.messages import RuntimeInfo
from edge_teacher.runtime.cut import cut

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

MAX_PARTS = 4
"""Graphs of fewer outputs that one session keeps: their weights take memory a second time."""
PART_WORTH = 0.8
"""A part that takes more than this share of the whole graph's time is not worth its memory."""
PART_IMAGES = 8
"""Images a part is judged on."""


class OnnxRuntimeSession:
    """One graph on `threads` cores, or on the GPU of another `provider`."""

    def __init__(
        self,
        graph: bytes,
        *,
        threads: int,
        name: str = "the graph",
        provider: str = CPU,
        provider_options: Mapping[str, str] | None = None,
        precision: str = "fp32",
    ) -> None:
        """Raises CheckFailed if the runtime cannot load the graph or it is no teacher or student.

        Also if it would run on another provider than asked: ONNX Runtime goes on with the CPU by itself.
        """
        self._threads = threads
        self._name = name
        self._provider = provider
        self._provider_options = dict(provider_options or {})
        self._precision = precision
        self._whole = self._load(graph)
        inputs = self._whole.get_inputs()
        if [i.name for i in inputs] != ["images"] or inputs[0].type != "tensor(uint8)":
            found = ", ".join(f"{i.name}: {i.type}" for i in inputs)
            raise CheckFailed(f"{name} takes ({found}), and must take images: uint8[N, H, W, 3]")
        self._outputs = tuple(output.name for output in self._whole.get_outputs())
        # Kept only where there is something to cut.
        self._graph = graph if len(self._outputs) > 1 else b""
        self._parts: OrderedDict[frozenset[str], ort.InferenceSession] = OrderedDict()
        self._judging = threading.Lock()

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            name="onnxruntime",
            version=ort.__version__,
            provider=self._provider,
            threads=self._threads,
            precision=self._precision,
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The named outputs, in one pass; what none of them needs is not computed where that saves time."""
        part = self._part(images, outputs)
        return dict(zip(outputs, self._fetch(part, images, outputs), strict=True))

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _load(self, graph: bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Several agents share a machine in the demo; a spinning thread would take a neighbour's core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[str | tuple[str, dict[str, str]]] = [CPU]
        if self._provider != CPU:
            providers.insert(0, (self._provider, self._provider_options))
        try:
            session = ort.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ORT raises bare pybind classes of its own
            raise CheckFailed(
                f"ONNX Runtime {ort.__version__} cannot load {self._name}: {error}"
            ) from error
        session.disable_fallback()
        if session.get_providers()[0] != self._provider:
            raise CheckFailed(
                f"ONNX Runtime {ort.__version__} has no working {self._provider} here: it would run "
                f"{self._name} on {session.get_providers()[0]}"
            )
        return session

    def _fetch(
        self, session: ort.InferenceSession, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        try:
            return session.run(list(outputs), {"images": images})  # type: ignore[no-any-return]
        except Exception as error:  # as above
            raise RuntimeFailed(
                f"ONNX Runtime failed on images {list(images.shape)}: {error}"
            ) from error

    def _part(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> ort.InferenceSession:
        """What computes these outputs in the least time; the whole graph while that is being found out."""
        wanted = frozenset(outputs)
        known = self._parts.get(wanted)
        if known is not None:
            return known
        if wanted >= set(self._outputs) or not wanted <= set(self._outputs) or not len(images):
            return self._whole
        # This provider would build an engine for the part, for minutes, while a query waits for it.
        if self._provider == TENSORRT:
            return self._whole
        if not self._judging.acquire(blocking=False):
            return self._whole
        try:
            found = self._parts[wanted] = self._judged(images[:PART_IMAGES], sorted(wanted))
            own = [key for key, session in self._parts.items() if session is not self._whole]
            if len(own) > MAX_PARTS:
                del self._parts[own[0]]
            return found
        finally:
            self._judging.release()

    def _judged(self, images: NDArray[np.uint8], outputs: list[str]) -> ort.InferenceSession:
        """The part that gives these outputs, if it is right and faster; else the whole graph."""
        wanted = self._fetch(self._whole, images, outputs)
        try:
            smaller = cut(self._graph, outputs, self._name)
            if smaller is self._graph:
                return self._whole
            part = self._load(smaller)
            _require_same(self._fetch(part, images, outputs), wanted)
        except (CheckFailed, RuntimeFailed) as error:
            log.warning(
                "%s: %s come from the whole graph, as a part of it will not do: %s",
                self._name,
                ", ".join(outputs),
                error,
            )
            return self._whole
        share = _share(
            lambda: self._fetch(part, images, outputs),
            lambda: self._fetch(self._whole, images, outputs),
            # On the CPU this thread does its share of the work, and what others do is not counted.
            clock=time.thread_time if self._provider == CPU else time.perf_counter,
        )
        log.info(
            "%s: %s alone take %.2f of the whole graph's time",
            self._name,
            ", ".join(outputs),
            share,
        )
        return part if share <= PART_WORTH else self._whole


def _require_same(
    found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]
) -> None:
    for a, b in zip(found, wanted, strict=True):
        largest = float(np.abs(b).max(initial=0))
        if not np.allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, largest)):
            raise CheckFailed("it answers otherwise than the whole graph")


def _share(
    of: Callable[[], object],
    whole: Callable[[], object],
    *,
    clock: Callable[[], float],
    rounds: int = 3,
) -> float:
    """Time of `of` over that of `whole`, in turns, the fastest of each: a busy machine only adds time."""
    fastest = [float("inf"), float("inf")]
    for _ in range(rounds):
        for i, task in enumerate((of, whole)):
            started = clock()
            task()
            fastest[i] = min(fastest[i], clock() - started)
    return fastest[0] / max(fastest[1], 1e-9)
