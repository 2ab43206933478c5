"""Queries of many coordinators through one graph together: each gets exactly its own rows.

Two threads take turns. Who has the turn admits what waits, composes one step of at most the best number of
images, and computes it; then it hands the turn on, and reduces, encodes and sends what its step has brought
while the other computes. Nobody is waited for: what is there when the turn begins is what is computed, so a
lone query starts at once, and batches come about when queries come faster than they are computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_teacher.agent.batch_sizes import BatchSizes
from edge_teacher.agent.ceiling import MemoryCeiling
from edge_teacher.agent.throttling import Throttling
from edge_teacher.agent.work import Floats, Inference, Kind, Listener, Work
from edge_teacher.contract.errors import Busy, RuntimeFailed
from edge_teacher.contract.images import Images
from edge_teacher.rpc.line import Asked, Line
from edge_teacher.runtime import Session
from edge_teacher.stopwatch import Stopwatch

log = logging.getLogger(__name__)

LATENCY_S = 0.05
"""What one step may take: a query that comes during it waits for its end."""

_IDLE_S = 1.0
_MOST_WORKS = 64
_TOO_HOT_RETRY_S = 5.0


class Plans(Protocol):
    """What queries mean."""

    def plan(self, asked: Asked) -> Inference:
        """Raises RpcError for a query that cannot be answered."""
        ...


@dataclass(frozen=True)
class Probe:
    """Images that nobody has asked about, to learn with how many a graph is fastest."""

    session: Session
    size: tuple[int, int]
    """(height, width)"""
    outputs: frozenset[str]

    @property
    def kind(self) -> Kind:
        return Kind(id(self.session), self.size, self.outputs)


@dataclass(frozen=True)
class _Part:
    """The rows of one work in a step."""

    work: Work
    where: slice
    listeners: tuple[Listener, ...]

    @property
    def rows(self) -> int:
        rows: int = self.where.stop - self.where.start
        return rows

    def moved(self) -> None:
        """A step of it has begun or ended: nobody who waits for it is stuck. Under the turn."""
        for listener in self.listeners:
            listener.asked.job.steps += 1


@dataclass(frozen=True)
class _Step:
    """What one run of a graph brought: rows of the outputs, one part after the other."""

    parts: list[_Part]
    found: Mapping[str, Floats]
    seconds: float

    def hand_out(self) -> None:
        """To each query its rows; what is done to all of them alike is done once."""
        reduced: dict[Hashable, Mapping[str, NDArray[np.generic]]] = {}
        count = sum(part.rows for part in self.parts)
        start = 0
        for part in self.parts:
            rows = slice(start, start + part.rows)
            start = rows.stop
            for listener in part.listeners:
                if listener.ended:
                    continue
                try:
                    kept = self._kept(listener.inference, part.where, rows, reduced)
                    complete = listener.take(kept, part.where, self.seconds * part.rows / count)
                except Exception as error:  # noqa: BLE001 - a neighbour has nothing to do with it
                    listener.refuse(error)
                    continue
                if complete:
                    listener.finish()

    def _kept(
        self,
        inference: Inference,
        where: slice,
        rows: slice,
        reduced: dict[Hashable, Mapping[str, NDArray[np.generic]]],
    ) -> Mapping[str, NDArray[np.generic]]:
        if inference.same is None:
            return inference.keep(
                {name: self.found[name][rows] for name in inference.outputs}, where
            )
        whole = reduced.get(inference.same)
        if whole is None:
            whole = reduced[inference.same] = inference.keep(self.found, where)
        return {name: values[rows] for name, values in whole.items()}


class Batcher:
    """An `Engine`."""

    threads = 2

    def __init__(
        self,
        plans: Plans,
        memory: MemoryCeiling,
        throttling: Throttling,
        *,
        latency_s: float = LATENCY_S,
        probes: Sequence[Probe] = (),
    ) -> None:
        self._plans = plans
        self._memory = memory
        self._throttling = throttling
        self.sizes: BatchSizes[Kind] = BatchSizes(
            latency_s=latency_s, fits=lambda kind, rows: memory.fits(kind, rows)
        )
        self._all_probes = tuple(probes)
        self._probes = list(probes)
        self._anew = threading.Event()
        self._stopwatch = Stopwatch()
        self._turn = threading.Lock()
        self._works: list[Work] = []
        """Under the turn; who was first in a step longest ago is first."""
        self._fresh: dict[Hashable, Work] = {}
        """Those of which nothing is computed yet, by what they are about: others may join them."""
        self._not_before = 0.0

    def learn_anew(self) -> None:
        """Another runtime executes the graphs: sizes and memory are measured from the beginning.

        On any thread; from the next step on.
        """
        self._anew.set()

    def serve(self, line: Line) -> None:
        while True:
            with self._turn:
                try:
                    parts = self._next(line)
                    if parts is None:
                        return
                    steps = self._compute(parts)
                except Exception as error:
                    works, self._works, self._fresh = self._works, [], {}
                    for listener in (each for work in works for each in work.listeners):
                        listener.refuse(error)
                    raise
            with line.together():
                for step in steps:
                    step.hand_out()

    # ── who is next, under the turn ──────────────────────────────────────────────────────────

    def _next(self, line: Line) -> list[_Part] | None:
        """The next step; empty if there is nothing to do now, None when the line is closed."""
        if self._anew.is_set():
            self._anew.clear()
            self.sizes.forget()
            self._probes = list(self._all_probes)
        self._pause(line)
        self._admit(line)
        self._works = [work for work in self._works if work.left]
        for work in self._works:
            if not work.drop_unwanted():
                self._fresh.pop(work.first.about, None)
        self._works = [work for work in self._works if work.listeners]
        if self._works:
            return self._compose()
        if line.closed:
            return None
        return []

    def _pause(self, line: Line) -> None:
        while not line.closed and (left := self._not_before - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _admit(self, line: Line) -> None:
        waiting = sum(work.left for work in self._works)
        enough = self._wanted_rows() if self._works else 0
        while len(self._works) < _MOST_WORKS:
            # Enough for a step is enough, but for coordinators who have nothing in it yet.
            full = bool(self._works) and waiting >= enough
            without = {work.asker for work in self._works} if full else ()
            asked = line.take(0 if self._works or self._probe() else _IDLE_S, without)
            if asked is None:
                return
            for each in (asked, *line.take_all(asked.about)):
                waiting += self._begin(each)
            enough = enough or (self._wanted_rows() if self._works else 0)

    def _wanted_rows(self) -> int:
        kind = self._works[0].kind
        return max(self.sizes.best(kind), self.sizes.untried(kind) or 0)

    def _begin(self, asked: Asked) -> int:
        """The rows it adds to what is to be computed."""
        try:
            state = self._throttling.state
            if state.refuses:
                raise Busy(  # noqa: TRY301
                    f"this device is too hot: {state.reason}; ask again later",
                    retry_after_s=_TOO_HOT_RETRY_S,
                )
            inference = self._plans.plan(asked)
            release = self._memory.reserve(inference.needs_bytes)
        except Exception as error:  # noqa: BLE001 - it is this query's alone
            asked.refuse(error)
            return 0
        listener = Listener(asked, inference, len(inference.images), release)
        same = self._fresh.get(inference.about)
        if same is not None:
            same.join(listener)
            return 0
        work = Work(asked.job.asker, inference, [listener], inference.outputs)
        self._works.append(work)
        self._fresh[inference.about] = work
        return work.left

    def _compose(self) -> list[_Part]:
        """A step: half of it for who has waited longest, the rest for those who need least.

        So a large query goes on however many small ones come, and they do not wait for its end.
        """
        first = self._works[0]
        group = [work for work in self._works if work.kind == first.kind]
        rows = self.sizes.choose(first.kind, sum(work.left for work in group))
        share = rows if len(group) == 1 else (rows + 1) // 2
        taken = {0: min(first.left, share)}
        free = rows - taken[0]
        others = sorted(range(1, len(group)), key=lambda i: group[i].left)
        for i in [*others, 0]:
            more = min(group[i].left - taken.get(i, 0), free)
            if more:
                taken[i] = taken.get(i, 0) + more
                free -= more
        self._works.remove(first)
        self._works.append(first)
        parts = []
        for i, count in taken.items():
            work = group[i]
            self._fresh.pop(work.first.about, None)
            part = _Part(work, work.take(count), tuple(work.listeners))
            part.moved()
            parts.append(part)
        return parts

    # ── computing, under the turn ────────────────────────────────────────────────────────────

    def _compute(self, parts: list[_Part]) -> list[_Step]:
        if not parts:
            self._try_probe()
            return []
        first = parts[0].work
        images = _joined([part.work.pixels(part.where) for part in parts])
        try:
            found, seconds = self._run(first.first.session, images, first.kind, first.outputs)
        except Exception as error:  # noqa: BLE001
            return self._apart(parts, error)
        for part in parts:
            part.moved()
        return [_Step(parts, found, seconds)]

    def _run(
        self, session: Session, images: Images, kind: Kind, outputs: frozenset[str]
    ) -> tuple[Mapping[str, Floats], float]:
        count = len(images)
        self._memory.require_front(kind, kind.size)
        before = self._memory.before_step(kind, count)
        started = self._stopwatch.start()
        found = session.run(images, sorted(outputs))
        seconds = self._stopwatch.seconds(started)
        self._memory.after_step(kind, count, before)
        for name, values in found.items():
            if len(values) != count:
                raise RuntimeFailed(
                    f"the graph gave {len(values)} rows of {name} for {count} images; its batch is fixed"
                )
        pause = self._throttling.pause_s(seconds)
        if pause:
            self._not_before = time.monotonic() + pause
        else:
            self.sizes.took(kind, count, seconds)
        return found, seconds

    def _apart(self, parts: list[_Part], error: Exception) -> list[_Step]:
        """After a failure: each work on its own, in ever smaller steps, so that only who fails alone fails."""
        made: list[_Step] = []
        for part in parts:
            try:
                made += self._alone(part, error if len(parts) == 1 else None)
            except Exception as own:  # noqa: BLE001
                for listener in part.listeners:
                    listener.refuse(own)
        return made

    def _alone(self, part: _Part, known: Exception | None) -> list[_Step]:
        """`known`: it has failed already. Raises the error of one image that fails alone."""
        work, error = part.work, known
        if error is None:
            try:
                found, seconds = self._run(
                    work.first.session, work.pixels(part.where), work.kind, work.outputs
                )
            except Exception as own:  # noqa: BLE001
                error = own
            else:
                part.moved()
                return [_Step([part], found, seconds)]
        if part.rows == 1:
            raise error
        middle = (part.where.start + part.where.stop) // 2
        halves = [slice(part.where.start, middle), slice(middle, part.where.stop)]
        made = [
            step for half in halves for step in self._alone(_Part(work, half, part.listeners), None)
        ]
        # Less at once does work: so it was the size, as where a GPU's memory ends.
        self.sizes.too_large(work.kind, part.rows)
        log.warning("%d images at once failed, and fewer did not: %s", part.rows, error)
        return made

    # ── learning while there is nothing to do ────────────────────────────────────────────────

    def _probe(self) -> tuple[Probe, int] | None:
        while self._probes and not self._throttling.state.throttled:
            size = self.sizes.untried(self._probes[0].kind)
            if size is not None:
                return self._probes[0], size
            probe = self._probes.pop(0)
            rates = {n: round(rate) for n, rate in self.sizes.rates(probe.kind).items()}
            log.info(
                "%s: fastest with %d images at once (images/s: %s)",
                " + ".join(sorted(probe.outputs)),
                self.sizes.best(probe.kind),
                rates,
            )
        return None

    def _try_probe(self) -> None:
        found = self._probe()
        if found is None:
            return
        probe, size = found
        images = np.random.default_rng(size).integers(0, 256, (size, *probe.size, 3), np.uint8)
        try:
            self._run(probe.session, images, probe.kind, probe.outputs)
        except Busy as error:  # memory is short now: that says nothing about the size
            log.info("what is fastest is learnt from what is asked: %s", error)
            self._probes.remove(probe)
        except Exception as error:  # noqa: BLE001 - nobody has asked for it
            log.warning("%d images at once cannot be computed here: %s", size, error)
            self.sizes.too_large(probe.kind, size)
            if size == 1:
                self._probes.remove(probe)


def _joined(pieces: list[Images]) -> Images:
    if len(pieces) == 1:
        return np.ascontiguousarray(pieces[0])
    return np.concatenate(pieces)
