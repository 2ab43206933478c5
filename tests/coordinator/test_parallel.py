from __future__ import annotations

import threading

import pytest

from coordinator.parallel import in_parallel

EIGHT = [f"d{i}" for i in range(8)]


def test_all_at_the_same_time_and_in_order() -> None:
    everyone = threading.Barrier(8, timeout=10)

    def do(device: str) -> str:
        everyone.wait()
        return device.upper()

    assert in_parallel(EIGHT, do) == [device.upper() for device in EIGHT]


def test_an_error_is_raised_without_waiting_for_the_others() -> None:
    over = threading.Event()

    def do(device: str) -> None:
        if device == "d3":
            raise ValueError(device)
        over.wait(30)

    with pytest.raises(ValueError, match="d3"):
        in_parallel(EIGHT, do)
    assert not over.is_set()
    over.set()


def test_progress_is_told_once_per_item_on_the_callers_thread() -> None:
    told: list[threading.Thread] = []
    in_parallel(EIGHT, str.upper, lambda: told.append(threading.current_thread()))
    assert told == [threading.current_thread()] * 8


def test_nobody() -> None:
    assert in_parallel([], str.upper) == []
