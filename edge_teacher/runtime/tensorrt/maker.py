"""An engine for a graph and some of its outputs: from the cache if it can be trusted, else built."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from types import ModuleType

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cuda import Gpu
from edge_teacher.runtime.cut import cut
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.tensorrt.build import build
from edge_teacher.runtime.tensorrt.cache import EngineCache
from edge_teacher.runtime.tensorrt.key import (
    EngineKey,
    Options,
    Profile,
    hardware_of,
    key_of,
    options_for,
)

log = logging.getLogger(__name__)

_building = threading.Lock()
"""A build measures kernels: a second one beside it would be measured too."""


@dataclass(frozen=True)
class Made:
    key: EngineKey
    engine: bytes
    seconds: float
    """For building it, or for reading it."""
    cached: bool
    notes: tuple[str, ...] = ()
    """What a person should know: a file that was not to be trusted, a folder that is full."""


class EngineMaker:
    """Engines of one graph on one GPU."""

    def __init__(
        self,
        module: ModuleType,
        gpu: Gpu,
        cache: EngineCache | None,
        *,
        options: Options | None = None,
    ) -> None:
        """Without a `cache` an engine lives as long as its session."""
        self._module = module
        self._hardware = hardware_of(module, gpu)
        self._cache = cache
        self._options = options or options_for(gpu)

    def make(
        self,
        graph: bytes,
        outputs: tuple[str, ...],
        *,
        precision: str,
        profile: Profile,
        watch: Watch | None = None,
        name: str = "the graph",
    ) -> Made:
        """Raises CheckFailed if TensorRT refuses the graph or the build was cancelled."""
        key = key_of(
            self._hardware,
            graph,
            outputs,
            precision=precision,
            profile=profile,
            options=self._options,
        )
        found, notes = self._found(key)
        if found is not None:
            return found
        with _building:
            # Whoever was at work until now may have built the same.
            found, _ = self._found(key)
            return found or self._build(key, cut(graph, outputs, name), notes, watch, name)

    def rebuild(self, made: Made, graph: bytes, watch: Watch | None, name: str) -> Made:
        """As `make`, without the cache's word: for an engine that TensorRT then would not load."""
        notes = ["the engine in the cache cannot be loaded, and is built again"]
        with _building:
            return self._build(made.key, cut(graph, made.key.outputs, name), notes, watch, name)

    def _found(self, key: EngineKey) -> tuple[Made | None, list[str]]:
        if self._cache is None:
            return None, []
        started = time.monotonic()
        engine, why_not = self._cache.engine(key)
        if engine is None:
            return None, [f"{why_not}; the engine is built again"] if why_not else []
        return Made(key, engine, time.monotonic() - started, cached=True), []

    def _build(
        self, key: EngineKey, graph: bytes, notes: list[str], watch: Watch | None, name: str
    ) -> Made:
        watch = watch or Watch()
        cache = self._cache
        if watch.cancelled.is_set():
            raise CheckFailed(f"the build of {name} was cancelled")
        built = build(
            self._module,
            graph,
            profile=key.profile,
            options=key.options,
            timing=b"" if cache is None else cache.timing(key.hardware),
            watch=watch,
            name=name,
        )
        if cache is not None:
            trouble = [cache.keep(key, built.engine)]
            if built.timing:
                trouble.append(cache.keep_timing(key.hardware, built.timing))
            notes += [each for each in dict.fromkeys(trouble) if each]
        for note in notes:
            log.warning("%s: %s", name, note)
        return Made(key, built.engine, built.seconds, cached=False, notes=tuple(notes))
