from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from edge_teacher.stopwatch import Stopwatch


def test_without_the_kernel_s_count_it_is_what_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr("edge_teacher.stopwatch.time.perf_counter", lambda: now[0])
    for path in (tmp_path / "none", tmp_path / "odd"):
        (tmp_path / "odd").write_text("nothing")
        watch = Stopwatch(str(path))
        started = watch.start()
        now[0] += 3
        assert watch.seconds(started) == 3.0


def test_what_was_waited_for_a_core_is_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr("edge_teacher.stopwatch.time.perf_counter", lambda: now[0])
    counts = tmp_path / "schedstat"
    counts.write_text("5 1000000000 7\n")
    watch = Stopwatch(str(counts))
    started = watch.start()
    now[0] += 3
    counts.write_text("9 2250000000 9\n")
    assert watch.seconds(started) == pytest.approx(1.75)


def test_work_that_shares_its_core_takes_what_it_takes_alone() -> None:
    """Of two threads that compute on one core, each waits for the other, and that is not counted."""
    core = min(os.sched_getaffinity(0))
    begin, end = threading.Barrier(2), threading.Event()

    def hog() -> None:
        os.sched_setaffinity(0, [core])
        begin.wait(10)
        while not end.is_set():
            os.urandom(1 << 16)  # without Python's lock

    found: list[tuple[float, float, float]] = []

    def work() -> None:
        os.sched_setaffinity(0, [core])
        begin.wait(10)
        watch = Stopwatch()
        started, cpu, began = watch.start(), time.thread_time(), time.perf_counter()
        while time.thread_time() - cpu < 0.1:
            os.urandom(1 << 16)
        found.append(
            (watch.seconds(started), time.thread_time() - cpu, time.perf_counter() - began)
        )
        end.set()

    threads = [threading.Thread(target=each) for each in (hog, work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ((undisturbed, cpu, passed),) = found
    assert cpu * 0.9 < undisturbed <= passed
    if Path("/proc/thread-self/schedstat").exists():
        assert undisturbed - cpu < 0.8 * (passed - cpu)
