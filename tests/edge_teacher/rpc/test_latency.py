from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher.rpc.latency import Latencies


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0.1, 900_000), min_size=1, max_size=300))
@settings(deadline=None, max_examples=50)
def test_percentiles_are_within_five_percent_of_the_exact_ones(milliseconds: list[float]) -> None:
    latencies = Latencies(["saliency"])
    for value in milliseconds:
        latencies.add("saliency", value / 1e3)
    told = latencies.told()["saliency"]
    for found, share in ((told.p50_ms, 50), (told.p99_ms, 99)):
        exact = float(np.percentile(milliseconds, share, method="inverted_cdf"))
        assert found == pytest.approx(exact, rel=0.05)
    assert told.count == len(milliseconds)
    assert told.total_s == pytest.approx(sum(milliseconds) / 1e3)


def test_what_is_too_short_or_too_long_counts_at_the_ends() -> None:
    latencies = Latencies(["a"])
    for seconds in (0.0, 1e-9, 1e9):
        latencies.add("a", seconds)
    told = latencies.told()["a"]
    assert told.p50_ms is not None
    assert told.p99_ms is not None
    assert told.p50_ms < 0.1
    assert told.p99_ms > 900_000


def test_percentiles_are_of_the_last_minutes_and_counts_of_the_whole_year() -> None:
    clock = Clock()
    latencies = Latencies(["a"], clock=clock)
    for _ in range(1000):
        latencies.add("a", 1.0)
    clock.now += 400
    latencies.add("a", 0.001)
    assert latencies.told()["a"].p50_ms == pytest.approx(1000, rel=0.05)
    clock.now += 300
    latencies.add("a", 0.001)
    told = latencies.told()["a"]
    assert (told.count, told.p50_ms) == (1002, pytest.approx(1, rel=0.05))
    clock.now += 365 * 86_400
    told = latencies.told()["a"]
    assert (told.count, told.p50_ms, told.p99_ms) == (1002, None, None)


def test_methods_nobody_asked_for_are_not_told() -> None:
    latencies = Latencies(["a", "b"])
    latencies.add("b", 0.1)
    assert list(latencies.told()) == ["b"]
