"""An ONNX file into an engine: one code path for TensorRT 10.x, 11.x and TensorRT-RTX."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.tensorrt.key import Options, Profile, version_of


@dataclass(frozen=True)
class Built:
    engine: bytes
    timing: bytes
    """What was measured of single layers: a build of something similar takes less time with it."""
    seconds: float


def build(
    module: ModuleType,
    graph: bytes,
    *,
    profile: Profile,
    options: Options,
    timing: bytes = b"",
    watch: Watch | None = None,
    name: str = "the graph",
) -> Built:
    """Parse and build a strongly typed network for any batch and size within `profile`.

    `timing`: of an earlier build on the same hardware; another's is ignored by TensorRT itself. Raises
    CheckFailed with the parser's or builder's own words, or if it was cancelled.
    """
    watch = watch or Watch()
    started = time.monotonic()
    log = logger(module)
    seen = log.count
    builder = module.Builder(log)
    typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = module.OnnxParser(network, log)
    version = version_of(module)
    if not parser.parse(graph):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise CheckFailed(f"the parser of {version} refuses {name}: {_line(said)}")
    config = _config(module, builder, options)
    config.add_optimization_profile(_profile(builder, network, profile, name))
    measured = config.create_timing_cache(timing)
    # A timing cache of another device or version is of no use, and no reason not to build.
    if measured is None or not config.set_timing_cache(measured, False):
        measured = config.create_timing_cache(b"")
        config.set_timing_cache(measured, False)
    monitor = _monitor(module, watch)
    if monitor is not None:
        config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if watch.cancelled.is_set():
        raise CheckFailed(f"the build of {name} was cancelled")
    if engine is None:
        raise CheckFailed(f"{version} cannot build {name}: {_line(log.since(seen))}")
    watch.progress(1.0)
    kept = config.get_timing_cache()
    return Built(
        engine=bytes(engine),
        timing=b"" if kept is None else bytes(kept.serialize()),
        seconds=time.monotonic() - started,
    )


def _config(module: ModuleType, builder: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.tf32:
        config.set_flag(module.BuilderFlag.TF32)
    else:
        config.clear_flag(module.BuilderFlag.TF32)
    return config


def _profile(builder: Any, network: Any, profile: Profile, name: str) -> Any:
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != ["images"]:
        raise CheckFailed(f"{name} takes {', '.join(inputs) or 'nothing'}, and must take images")
    made = builder.create_optimization_profile()
    made.set_shape("images", profile.least, profile.best, profile.most)
    return made


def _line(text: str) -> str:
    return " ".join(text.split())[:600] or "it gives no reason"


# ── what TensorRT says ───────────────────────────────────────────────────────────────────────

_loggers: dict[str, Any] = {}


def logger(module: ModuleType) -> Any:
    """TensorRT keeps the first logger of a process and ignores others: there is one for each module."""
    if module.__name__ not in _loggers:

        class Collecting(module.ILogger):  # type: ignore[name-defined,misc]  # known only at run time
            """Keeps the last errors instead of printing them."""

            def __init__(self) -> None:
                super().__init__()
                self.count = 0
                self._messages: deque[tuple[int, str]] = deque(maxlen=20)

            def log(self, severity: Any, message: str) -> None:
                if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                    self.count += 1
                    self._messages.append((self.count, message))

            def since(self, count: int) -> str:
                return "; ".join(text for number, text in self._messages if number > count)

        _loggers[module.__name__] = Collecting()
    return _loggers[module.__name__]


class Phases:
    """The share of a build that is done, from phases inside phases (TensorRT, IProgressMonitor)."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lock = threading.Lock()
        self._steps: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps, done)
        self._told = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._steps[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            if name in self._steps:
                parent, steps, _ = self._steps[name]
                self._steps[name] = (parent, steps, min(step + 1, steps))
            self._tell()
        return not self._watch.cancelled.is_set()

    def finish(self, name: str) -> None:
        with self._lock:
            self._steps.pop(name, None)

    def _tell(self) -> None:
        roots = [name for name, (parent, *_) in self._steps.items() if parent not in self._steps]
        # Whatever the phases say, a bar that runs back tells nothing; the end is told by the builder.
        share = min(max((self._share(name) for name in roots), default=0.0), 0.99)
        if share > self._told:
            self._told = share
            self._watch.progress(share)

    def _share(self, name: str) -> float:
        _, steps, done = self._steps[name]
        inner = [self._share(n) for n, (parent, *_) in self._steps.items() if parent == name]
        return min((done + max(inner, default=0.0)) / steps, 1.0)


def _monitor(module: ModuleType, watch: Watch) -> Any:
    """None where the module has no such thing (before 8.6)."""
    if not hasattr(module, "IProgressMonitor"):
        return None

    class Monitor(module.IProgressMonitor):  # type: ignore[name-defined,misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self._phases = Phases(watch)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return self._phases.step(name, step)

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)

    return Monitor()
