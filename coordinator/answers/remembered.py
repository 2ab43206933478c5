"""All that is remembered, in one folder: `<bundle>/<question>/` is a store."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from coordinator.answers.keys import Keys, Question
from coordinator.answers.store import AnswerStore

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """Of some keys [N]: those at `rows` (bool[N]) are remembered, with these answers [K, ...]."""

    rows: NDArray[np.bool_]
    answers: NDArray[np.float16]


class RememberedAnswers:
    """Thread-safe, and safe with other processes on the same folder.

    What the disk refuses is no reason to end a run: it goes on without remembering, and says so once.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _sentence: None) -> None:
        """`say` is told, once each, that answers were damaged, and that no more can be remembered."""
        self._folder = folder
        self._say = say
        self._stores: dict[Question, AnswerStore] = {}
        self._lock = threading.Lock()
        self._refused = False
        self._damage_said = False

    def __enter__(self) -> RememberedAnswers:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others prune. It can be used again, and then opens anew what it needs."""
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()

    def known(self, question: Question, teacher: str, keys: Keys) -> Known | None:
        """What is remembered for `keys` [N]; None for nothing at all.

        `teacher` is who would be asked, for people. The answers may be a view of the file.
        """
        try:
            store = self._open(question, teacher)
            positions = store.find(keys)
        except OSError as error:
            self._refuse(error)
            return None
        self._tell_damage(store)
        found = positions >= 0
        return Known(found, store.rows(positions[found])) if found.any() else None

    def asked_before(self, question: Question) -> bool:
        """Whether anything was ever remembered of `question`."""
        return (self._path(question) / "index").exists()

    def remember(
        self, question: Question, teacher: str, keys: Keys, answers: NDArray[np.float16]
    ) -> None:
        """Answers [N, ...] for `keys` [N]. On disk when this returns, unless the disk refuses.

        Raises Malformed for answers of another shape than those remembered.
        """
        if self._refused:
            return
        try:
            store = self._open(question, teacher)
            store.append(keys, answers)
        except OSError as error:
            self._refuse(error)
        else:
            self._tell_damage(store)

    def _open(self, question: Question, teacher: str) -> AnswerStore:
        with self._lock:
            if question not in self._stores:
                self._stores[question] = AnswerStore(self._path(question), question, teacher)
            return self._stores[question]

    def _path(self, question: Question) -> Path:
        # A device says itself what its bundle is: a digest, or something that leads out of here.
        said = question.bundle
        digest = said if _DIGEST.fullmatch(said) else hashlib.sha256(said.encode()).hexdigest()
        return self._folder / digest / question.digest[:32]

    def _refuse(self, error: OSError) -> None:
        with self._lock:
            first, self._refused = not self._refused, True
        if first:
            self._say(
                f"Answers are not remembered any more: {error.strerror or error} in {self._folder}; "
                "the run goes on, and another one will ask again"
            )

    def _tell_damage(self, store: AnswerStore) -> None:
        with self._lock:
            first = store.damaged > 0 and not self._damage_said
            self._damage_said |= first
        if first:
            self._say(
                f"Remembered answers were damaged, as a crash or a bad disk leaves them (in "
                f"{store.folder}); those are asked for again"
            )
