"""What an agent answers with: the images it holds, the batches it makes of queries, and how far it may go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_teacher.agent.answers import Answers
from edge_teacher.agent.batching import Batcher, Probe
from edge_teacher.agent.ceiling import MemoryCeiling, default_ceiling_bytes
from edge_teacher.agent.image_store import ImageStore
from edge_teacher.agent.throttling import Throttling
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Card, TeacherInfo
from edge_teacher.rpc.line import Joint
from edge_teacher.rpc.serve import Method
from edge_teacher.runtime import Session
from edge_teacher.slots import Students


class Serving:
    """Made when the teacher is loaded: what it leaves of the memory is for questions."""

    def __init__(
        self,
        teacher: TeacherInfo,
        session: Session,
        limits: Limits,
        throttling: Throttling,
        *,
        memory_bytes: int | None = None,
    ) -> None:
        """`memory_bytes`: the ceiling of this process; None: nine tenths of what it may have.

        Raises UsageError for a ceiling that leaves nothing beside the teacher.
        """
        self.memory = MemoryCeiling(_ceiling(memory_bytes))
        self.throttling = throttling
        self.limits = limits.within(self.memory.for_questions(self.memory.ceiling_bytes))
        """As the card announces them: what the memory cannot hold is not promised."""
        self.images = ImageStore(self.limits, self.memory.has_room)
        self._teacher = teacher
        self._session = session
        self._asked = limits
        self._answers: Answers | None = None
        self._batcher: Batcher | None = None

    def check_ceiling(self, memory_bytes: int | None) -> None:
        """Raises UsageError as at the start."""
        self.memory.for_questions(_ceiling(memory_bytes))

    def limit(self, limits: Limits, memory_bytes: int | None) -> None:
        """Other limits, and another ceiling, from the next question on.

        Raises UsageError as at the start; then nothing has changed.
        """
        left = self.memory.limit(_ceiling(memory_bytes))
        self._asked = limits
        self._set_limits(left)

    def begin(
        self, students: Students, card: Callable[[], Card], card_changed: Callable[[], None]
    ) -> tuple[Mapping[str, Method[Any] | Joint[Any]], Batcher]:
        """What a `Server` needs: its methods, and the engine of those that are joint."""
        answers = self._answers = Answers(
            self._teacher,
            self._session,
            self.images,
            students,
            card,
            card_changed,
            max_answer_bytes=self.limits.max_answer_bytes,
        )
        features = f"features.{self._teacher.saliency_tap}"
        probes = [
            Probe(self._session, self._teacher.input_size, frozenset(outputs))
            for outputs in (("saliency", features), (features,), ("saliency",))
        ]
        self._batcher = Batcher(answers, self.memory, self.throttling, probes=probes)
        return answers.methods(), self._batcher

    def runtime_changed(self, grown_bytes: int) -> None:
        """Another one answers, and has taken so much memory: the limits follow. On any thread.

        What was measured of the one before says nothing about this one.
        """
        self._set_limits(self.memory.runtime_changed(grown_bytes))
        if self._batcher is not None:
            self._batcher.learn_anew()

    def _set_limits(self, memory_bytes: int) -> None:
        self.limits = self._asked.within(memory_bytes)
        self.images.limit(self.limits)
        if self._answers is not None:
            self._answers.limit(self.limits.max_answer_bytes)


def _ceiling(memory_bytes: int | None) -> int:
    return default_ceiling_bytes() if memory_bytes is None else memory_bytes
