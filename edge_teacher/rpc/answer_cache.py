"""Answers that may be asked for again: bounded in bytes and time, and never computed twice meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_teacher.contract import frame
from edge_teacher.contract.limits import Limits
from edge_teacher.rpc.fair_queue import Key

_MOST_COMMANDS = 4096
"""Outcomes of commands that are kept whatever else needs memory; about a kilobyte each."""

_MOST_GONE = 8192
"""Requests of which only the key is remembered; some 200 bytes each."""


@dataclass
class Answered:
    """An answer as it is sent. `sha256` is empty for one that travels in one message."""

    payload: frame.Encoded
    sha256: str = ""
    minor: int = 0
    """Of the asker's protocol."""
    on_its_way_until: float = 0.0
    """Held in any case until then: its chunks are still to be sent. 0: it has arrived, or fits a message."""
    used: float = 0.0
    status: int = 200
    of_a_command: bool = False
    """Computed again, it would change something again: never evicted for the memory of others."""


class AnswerCache:
    """Thread-safe. `gone` keys were answered for good, or withdrawn: their duplicates are ignored."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: OrderedDict[Key, Answered] = OrderedDict()
        """The least recently used first."""
        self._on_their_way: dict[Key, Answered] = {}
        self._commands: OrderedDict[Key, Answered] = OrderedDict()
        """The oldest first."""
        self._gone: OrderedDict[Key, float] = OrderedDict()
        self._bytes = 0
        self._bytes_on_their_way = 0
        self._command_bytes = 0
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Of all answers held; at most the cache's limit and what is on its way besides."""
        return self._bytes

    def limit(self, limits: Limits) -> None:
        """Other limits, from now on: what is held beyond them is let go."""
        with self._changed:
            self._limits = limits
            self._expire()
            self._changed.notify_all()

    def get(self, key: Key) -> Answered | None:
        with self._changed:
            self._expire()
            found = self._held.get(key)
            if found is not None:
                found.used = time.monotonic()
                self._held.move_to_end(key)
            return found

    def holds(self, key: Key) -> bool:
        """Whether it is still there; looking is no use, and keeps nothing from expiring."""
        with self._changed:
            return key in self._held

    def is_gone(self, key: Key) -> bool:
        with self._changed:
            return key in self._gone

    def put(self, key: Key, answer: Answered, *, wait_until: float) -> bool:
        """Remember `answer`. While others on their way take the memory, wait for it; False if in vain.

        One that fits a message is sent at once, and waits for nobody.
        """
        size = answer.payload.nbytes
        with self._changed:
            while True:
                self._expire()
                taken = self._bytes_on_their_way
                if (
                    not answer.on_its_way_until
                    or not taken
                    or taken + size <= self._limits.max_outgoing_bytes
                ):
                    break
                left = wait_until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))  # the time limit of another may be next
            self._drop(key)
            answer.used = time.monotonic()
            self._held[key] = answer
            if answer.on_its_way_until:
                self._on_their_way[key] = answer
                self._bytes_on_their_way += size
            elif answer.of_a_command:
                self._commands[key] = answer
                self._command_bytes += size
                if len(self._commands) > _MOST_COMMANDS:  # from now on the oldest is like any other
                    self._no_command(next(iter(self._commands)))
            self._bytes += size
            self._evict()
            return True

    def finish(self, key: Key) -> None:
        """It has arrived, or nobody wants it: free it, and never compute it again."""
        with self._changed:
            self._drop(key)
            self._gone[key] = time.monotonic()
            while len(self._gone) > _MOST_GONE:
                self._gone.popitem(last=False)

    def clear(self) -> None:
        with self._changed:
            for key in list(self._held):
                self._drop(key)

    def expire(self) -> None:
        """Let go of what nobody has asked for in time."""
        with self._changed:
            self._expire()

    def _expire(self) -> None:
        now = time.monotonic()
        oldest = now - self._limits.answer_cache_s
        for key, answer in list(self._on_their_way.items()):
            if answer.on_its_way_until < now:  # nobody waits for its chunks any more
                self._arrived(key)
                self._changed.notify_all()
        first = next(iter(self._held.values()), None)
        if first is not None and first.used < oldest:
            for key in [k for k, a in self._first(lambda a: a.used < oldest)]:
                if key not in self._on_their_way:
                    self._drop(key)
        for key in list(self._gone):
            if self._gone[key] >= oldest:
                break
            del self._gone[key]
        self._evict()

    def _first(self, wanted: Callable[[Answered], bool]) -> Iterator[tuple[Key, Answered]]:
        return itertools.takewhile(lambda item: wanted(item[1]), self._held.items())

    def _evict(self) -> None:
        """What is on its way, and what commands came to, counts apart.

        A large answer must not displace what others may ask again, and nothing a command's outcome.
        """
        apart = self._bytes_on_their_way + self._command_bytes
        over = self._bytes - apart - self._limits.answer_cache_bytes
        if over <= 0:
            return
        for key in list(self._held)[:-1]:  # the newest may be asked for again at once
            if over <= 0:
                return
            if key not in self._on_their_way and key not in self._commands:
                over -= self._held[key].payload.nbytes
                self._drop(key)

    def _arrived(self, key: Key) -> None:
        answer = self._on_their_way.pop(key, None)
        if answer is not None:
            self._bytes_on_their_way -= answer.payload.nbytes

    def _drop(self, key: Key) -> None:
        self._arrived(key)
        self._no_command(key)
        answer = self._held.pop(key, None)
        if answer is not None:
            self._bytes -= answer.payload.nbytes
            self._changed.notify_all()

    def _no_command(self, key: Key) -> None:
        command = self._commands.pop(key, None)
        if command is not None:
            self._command_bytes -= command.payload.nbytes
