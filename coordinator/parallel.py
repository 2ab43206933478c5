"""Several devices at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def in_parallel(
    items: Sequence[Item],
    do: Callable[[Item], Outcome],
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """`do` each item on a thread of its own; the outcomes in the order of the items.

    `done` is called on the caller's thread, once per item. Raises the first error.
    """
    pool = ThreadPoolExecutor(max(1, len(items)), thread_name_prefix="device")
    try:
        begun = [pool.submit(do, item) for item in items]
        for finished in as_completed(begun):
            finished.result()
            done()
        return [finished.result() for finished in begun]
    finally:
        # Not waiting: after an error or a Ctrl-C, closing the connection ends what is still asked.
        pool.shutdown(wait=False, cancel_futures=True)
