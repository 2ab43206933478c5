"""Many questions, a few of them on their way at any time."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

Body = TypeVar("Body")
Found = TypeVar("Found")


def arrivals(
    submit: Callable[[Body], Future[Found]],
    cancel: Callable[[Future[Found]], None],
    bodies: Iterable[Body],
    *,
    outstanding: int,
) -> Generator[tuple[int, Future[Found]], None, None]:
    """(number of the question, its finished future), as the answers come.

    A body is taken from `bodies` only when it is about to be sent. Closing the iterator cancels what is
    still outstanding.
    """
    done: queue.SimpleQueue[tuple[int, Future[Found]]] = queue.SimpleQueue()
    waiting: set[Future[Found]] = set()
    numbered = enumerate(bodies)
    try:
        while True:
            while len(waiting) < outstanding and (item := next(numbered, None)) is not None:
                number, body = item
                future = submit(body)
                waiting.add(future)
                future.add_done_callback(lambda f, n=number: done.put((n, f)))  # type: ignore[misc]
            if not waiting:
                return
            number, future = done.get()
            waiting.discard(future)
            yield number, future
    finally:
        for future in waiting:
            cancel(future)
