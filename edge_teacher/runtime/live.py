"""A session that answers at once with what there is, and goes over to what is better once that is proved."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import FedsaError, RuntimeFailed
from edge_teacher.contract.messages import EngineState, RuntimeInfo
from edge_teacher.memory import resident_bytes
from edge_teacher.runtime.model import Model
from edge_teacher.runtime.opened import Candidate, Found, Opened, Watch
from edge_teacher.runtime.session import Session
from edge_teacher.runtime.trial import (
    Trial,
    ms_per_image,
    one_line,
    require_agreement,
    require_finite,
    slower,
)
from edge_teacher.runtime.worker import Worker

log = logging.getLogger(__name__)

Answers = Mapping[str, NDArray[np.float32]]


class _Use:
    """A session and how many queries are in it: what is replaced is closed when the last has left."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.queries = 0
        self.retired = False


class LiveSession:
    """The CPU from the start; then, by measurement, the best of the candidates that answer as the CPU does."""

    def __init__(
        self,
        model: Model,
        base: Session | None,
        worker: Worker,
        *,
        changed: Callable[[], None],
        base_load_s: float = 0.0,
        resident_before: int = 0,
    ) -> None:
        """`base`: ONNX Runtime on the CPU; None where there is none, then `search` must come before `run`.

        `base_load_s`, `resident_before`: how long it took to load, and the process's memory before it.
        """
        self._model = dataclasses.replace(model, graphs={})  # sessions have what they need of them
        self._base = base
        self._worker = worker
        self._changed = changed
        self._base_load_s = base_load_s
        self._resident_before = resident_before
        self._why_not: dict[str, str] = {}
        self._lock = threading.Lock()
        self._use = None if base is None else _Use(Opened(base))
        self._engine: EngineState = "none"
        self._progress = 0.0
        self._detail = ""
        self._gpu = ""
        self._switched = 0
        self._elsewhere: set[tuple[int, int]] = set()
        self._trials: dict[str, Trial] = {}
        self._picked = ""

    @property
    def info(self) -> RuntimeInfo:
        """What answers now, and what became of the rest."""
        with self._lock:
            found = self._current().opened.session.info
            trial = self._trials.get(self._picked)
            return msgspec.structs.replace(
                found,
                engine=self._engine,
                engine_progress=round(self._progress, 2) if self._engine == "building" else 0.0,
                detail=self._detail,
                gpu=found.gpu or self._gpu,
                ms_per_image=() if trial is None else trial.ms_per_image,
                why_not=dict(self._why_not),
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        with self._lock:
            return self._current().opened.session.outputs

    @property
    def switched(self) -> int:
        """How often it has changed over: what was learnt of another runtime's times holds no longer."""
        return self._switched

    @property
    def answers(self) -> bool:
        """Whether there is anything that does."""
        return self._use is not None

    @property
    def why_not(self) -> Mapping[str, str]:
        """Runtime to the reason why it is not used."""
        with self._lock:
            return dict(self._why_not)

    @property
    def grown_bytes(self) -> int:
        """What answers now has taken beside the CPU's session, of the process and of the GPU."""
        with self._lock:
            trial = self._trials.get(self._picked)
            if trial is None or self._current().opened.session is self._base:
                return 0
            return trial.memory_bytes or 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Everything that was tried so far, with what it gave."""
        with self._lock:
            return tuple(self._trials.values())

    def run(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> Answers:
        with self._in_use() as opened:
            if opened.session is self._base or self._base is None:
                return opened.session.run(images, outputs)
            if opened.fits(images):
                try:
                    return opened.session.run(images, outputs)
                except RuntimeFailed as error:
                    self._give_up(opened, error)
            else:
                self._note_elsewhere((images.shape[1], images.shape[2]))
        return self._base.run(images, outputs)

    def close(self) -> None:
        """End what is being prepared, and give back what the GPU holds once no query needs it.

        Queries that were begun with it and run later are answered on the CPU, where there is one.
        """
        self._worker.close()
        if self._base is not None:
            self._switch(Opened(self._base))
            return
        with self._lock:
            use = self._use
            if use is None:
                return
            use.retired = True
            idle = use.queries == 0
        if idle:
            self._release(use.opened)

    def search(self, find: Callable[[], Found], *, measure_base: bool = False) -> None:
        """Try everything `find` finds; the best answers from the moment it has proved itself.

        `find` may take its time: nobody waits for it but this thread. `measure_base`: also where there is
        nothing to choose from.
        """
        machine = find()
        found = machine.candidates
        with self._lock:
            self._why_not |= machine.absent
            self._gpu = machine.gpu
            if any(candidate.runtime == "tensorrt" for candidate in found):
                self._engine = "building"
        if not found and not measure_base:
            return
        wanted, images = None, self._model.images()
        if self._base is not None:
            wanted = self._base.run(images, self._base.outputs)
            self._measure_base(self._base, images)
        if found:
            self._changed()
        for candidate in found:
            if self._worker.cancelled.is_set():
                return
            self._try(candidate, images, wanted, machine.free_bytes)
        self._settle(found)

    # ── trying ───────────────────────────────────────────────────────────────────────────────

    def _measure_base(self, base: Session, images: NDArray[np.uint8]) -> None:
        info = base.info
        trial = Trial(
            runtime=info.name,
            provider=info.provider,
            precision=info.precision,
            version=info.version,
            load_s=round(self._base_load_s, 3),
            ms_per_image=ms_per_image(base, images),
            memory_bytes=max(0, resident_bytes() - self._resident_before),
            largest_difference=0.0,
        )
        with self._lock:
            self._trials[trial.label] = trial
            self._picked = trial.label

    def _try(
        self,
        candidate: Candidate,
        images: NDArray[np.uint8],
        wanted: Answers | None,
        free_bytes: Callable[[], int],
    ) -> None:
        trial = Trial(
            runtime=candidate.runtime,
            provider=candidate.provider,
            precision=candidate.precision,
            version=candidate.version,
        )
        opened = None
        watch = Watch(progress=self._note_progress, cancelled=self._worker.cancelled)
        log.info("%s: trying %s", self._model.name, candidate.label)
        try:
            resident, free, started = resident_bytes(), free_bytes(), time.monotonic()
            opened = candidate.open(watch)
            spent = time.monotonic() - started
            trial = msgspec.structs.replace(
                trial,
                load_s=round(max(0.0, spent - (opened.build_s or 0.0)), 3),
                build_s=None if opened.build_s is None else round(opened.build_s, 3),
                notes=opened.notes,
            )
            largest = None
            if wanted is not None:
                largest = require_agreement(
                    opened.session, wanted, images, self._held_to(candidate)
                )
            else:
                require_finite(opened.session.run(images, opened.session.outputs))
            self._model.accept(opened.session, candidate.precision)
            trial = msgspec.structs.replace(
                trial,
                largest_difference=largest,
                ms_per_image=ms_per_image(opened.session, images),
                memory_bytes=max(0, resident_bytes() - resident) + max(0, free - free_bytes()),
            )
        except FedsaError as error:
            self._refuse(trial, str(error), opened)
            return
        except Exception as error:  # a runtime's own kind: it must not end the search
            log.exception("%s: %s failed", self._model.name, candidate.label)
            self._refuse(trial, f"{type(error).__name__}: {error}", opened)
            return
        self._compare(trial, opened)

    def _held_to(self, candidate: Candidate) -> str:
        """The precision that explains a difference: what the CPU runs in INT8 is no measure of FP32."""
        if self._base is None or self._base.info.precision == "fp32":
            return candidate.precision
        return self._base.info.precision

    def _refuse(self, trial: Trial, said: str, opened: Opened | None) -> None:
        reason = one_line(said)
        log.warning("%s: %s is not used: %s", self._model.name, trial.label, reason)
        with self._lock:
            self._trials[trial.label] = msgspec.structs.replace(
                trial, state="refused", reason=reason
            )
            self._why_not[trial.label] = reason
        if opened is not None:
            self._release(opened)

    def _compare(self, trial: Trial, opened: Opened) -> None:
        """Go over to it if it is faster than what answers now."""
        if self._worker.cancelled.is_set():
            self._release(opened)
            return
        with self._lock:
            best = self._trials.get(self._picked)
        if best is not None and slower(trial, best):
            reason = f"slower than {best.label}: {trial.times} and not {best.times}"
            with self._lock:
                self._trials[trial.label] = msgspec.structs.replace(trial, reason=reason)
                self._why_not[trial.label] = reason
            self._release(opened)
            return
        with self._lock:
            self._trials[trial.label] = trial
            self._picked = trial.label
            if best is not None and best.runtime:
                self._why_not[best.label] = (
                    f"slower than {trial.label}: {best.times} and not {trial.times}"
                )
        self._switch(opened)
        log.info("%s is answered by %s: %s", self._model.name, trial.label, trial.times)
        self._changed()

    def _settle(self, found: list[Candidate]) -> None:
        with self._lock:
            if any(candidate.runtime == "tensorrt" for candidate in found):
                tried = [t for t in self._trials.values() if t.runtime == "tensorrt"]
                usable = [t for t in tried if t.state != "refused"]
                self._engine = "ready" if usable else "failed"
                if not usable:
                    self._detail = "; ".join(t.reason for t in tried)
            picked = self._trials.get(self._picked)
            if picked is not None:
                others = len(self._trials) > 1
                self._trials[self._picked] = msgspec.structs.replace(
                    picked,
                    state="picked",
                    reason="the fastest of those that answer as the CPU does"
                    if others
                    else "the only one there is",
                )
                for label, trial in self._trials.items():
                    if label != self._picked and trial.state == "usable" and not trial.reason:
                        self._trials[label] = msgspec.structs.replace(
                            trial, reason=self._why_not.get(label, "")
                        )
        if found:
            self._changed()

    # ── answering ────────────────────────────────────────────────────────────────────────────

    def _current(self) -> _Use:
        if self._use is None:
            raise RuntimeFailed(f"nothing on this machine executes {self._model.name} yet")
        return self._use

    @contextmanager
    def _in_use(self) -> Iterator[Opened]:
        with self._lock:
            use = self._current()
            use.queries += 1
        try:
            yield use.opened
        finally:
            with self._lock:
                use.queries -= 1
                last = use.retired and use.queries == 0
            if last:
                self._release(use.opened)

    def _switch(self, opened: Opened) -> None:
        with self._lock:
            before, self._use = self._use, _Use(opened)
            self._switched += 1
            idle = False
            if before is not None:
                before.retired = True
                idle = before.queries == 0
            self._detail = ""
        if before is not None and idle:
            self._release(before.opened)

    def _release(self, opened: Opened) -> None:
        """After some errors CUDA takes nothing back any more: what it says then is no query's affair."""
        try:
            opened.close()
        except RuntimeFailed as error:
            log.warning("%s: the GPU's memory cannot be given back: %s", self._model.name, error)

    def _give_up(self, opened: Opened, error: RuntimeFailed) -> None:
        """What failed once on the GPU is not trusted again before a restart: the CPU answers."""
        assert self._base is not None
        with self._lock:
            if self._use is None or self._use.opened is not opened:
                return  # another query has seen it too
            label = self._picked
        reason = (
            f"failed while it answered, and is not used before the next start: {one_line(error)}"
        )
        log.error("%s: %s %s; the CPU answers instead", self._model.name, label, reason)
        self._switch(Opened(self._base))
        info = self._base.info
        with self._lock:
            self._engine = "failed"
            self._detail = f"{label} {reason}"
            self._why_not[label] = reason
            self._picked = f"{info.name} {info.provider} {info.precision}"
            self._why_not.pop(self._picked, None)
        self._changed()

    def _note_elsewhere(self, size: tuple[int, int]) -> None:
        with self._lock:
            known = size in self._elsewhere or len(self._elsewhere) >= 8
            if not known:
                self._elsewhere.add(size)
                sizes = ", ".join(f"{h}x{w}" for h, w in sorted(self._elsewhere))
                self._detail = (
                    f"images of {sizes} are answered on the CPU: the engine has no such size"
                )
        if not known:
            log.warning("%s: %s", self._model.name, self._detail)
            self._changed()

    def _note_progress(self, share: float) -> None:
        with self._lock:
            tenths = int(share * 10)
            worth_a_line = tenths != int(self._progress * 10) and tenths > 0
            self._progress = share
        if worth_a_line:
            log.info("%s: %d %% of an engine is built", self._model.name, tenths * 10)
