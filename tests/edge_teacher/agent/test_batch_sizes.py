from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher.agent.batch_sizes import SIZES, BatchSizes

KIND = "graph"


def learn(
    sizes: BatchSizes, seconds: Callable[[int], float], steps: int = 400, waiting: int = 1000
) -> list[int]:
    """Work through `steps` steps that take what `seconds` says; what was chosen."""
    chosen = []
    for _ in range(steps):
        rows = sizes.choose(KIND, waiting)
        chosen.append(rows)
        sizes.took(KIND, rows, seconds(rows))
    return chosen


def everything_fits(_kind: object, _rows: int) -> bool:
    return True


def cache_holds_eight(rows: int) -> float:
    each_ms = {1: 4.0, 2: 3.0, 4: 2.5, 8: 2.0, 16: 3.0, 32: 3.2, 64: 3.3, 128: 3.4}
    return each_ms[rows] * rows * 1e-3


def test_what_is_measured_fastest_is_kept() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    chosen = learn(sizes, cache_holds_eight)
    assert sizes.best(KIND) == 8
    assert chosen[-100:].count(8) > 95
    # Two larger ones were slower: what is larger still was never tried.
    assert max(chosen) == 32


def test_of_several_as_fast_short_steps_with_few_of_them_are_taken() -> None:
    sizes = BatchSizes(latency_s=0.05, fits=everything_fits)
    learn(sizes, lambda rows: rows * 1e-3)
    assert sizes.best(KIND) == 8  # 8 ms: at most a quarter of the latency


def test_a_busy_machine_does_not_decide() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    step = iter(range(10_000))
    learn(sizes, lambda rows: cache_holds_eight(rows) * (20 if next(step) % 3 == 0 else 1))
    assert sizes.best(KIND) == 8


def test_it_follows_a_machine_that_changes() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    learn(sizes, lambda rows: (8 + rows) * 1e-3)
    assert sizes.best(KIND) == 128
    # From now on large ones are slow: as when others have come who use the cache.
    learn(sizes, lambda rows: rows * 1e-3 * (1 if rows <= 64 else 4), steps=6000)
    assert sizes.best(KIND) == 64


def test_no_more_than_wait_and_at_least_one() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    learn(sizes, lambda rows: (8 + rows) * 1e-3)
    assert [sizes.choose(KIND, waiting) for waiting in (1, 3, 70)] == [1, 3, 70]


def test_steps_that_would_make_others_wait_too_long_are_not_even_tried() -> None:
    sizes = BatchSizes(latency_s=0.05, fits=everything_fits)
    chosen = learn(sizes, lambda rows: rows * 0.01)
    assert max(chosen) == 4
    slow = BatchSizes(latency_s=0.05, fits=everything_fits)
    assert set(learn(slow, lambda rows: rows * 1.0)) == {1}


def test_what_memory_does_not_hold_is_not_tried_and_not_kept() -> None:
    most = [16]
    sizes = BatchSizes(latency_s=10, fits=lambda _kind, rows: rows <= most[0])
    assert max(learn(sizes, lambda rows: (8 + rows) * 1e-3)) == 16
    most[0] = 4
    assert max(learn(sizes, lambda rows: (8 + rows) * 1e-3)[200:]) == 4


def test_beyond_a_failure_it_does_not_go_again() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    learn(sizes, lambda rows: (8 + rows) * 1e-3)
    sizes.too_large(KIND, 32)
    assert max(learn(sizes, lambda rows: (8 + rows) * 1e-3)) == 16
    sizes.too_large(KIND, 1)
    assert set(learn(sizes, lambda rows: (8 + rows) * 1e-3)) == {1}


def test_kinds_are_learnt_apart_and_the_oldest_is_forgotten() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    learn(sizes, lambda rows: (8 + rows) * 1e-3)
    assert sizes.best("another") == 1
    for i in range(16):
        sizes.choose(i, 1)
    assert sizes.rates(KIND) == {}


@settings(max_examples=60, deadline=None)
@given(
    each_ms=st.lists(st.floats(0.1, 20), min_size=len(SIZES), max_size=len(SIZES)),
    latency_s=st.floats(0.001, 1),
    most=st.integers(1, 300),
)
def test_whatever_the_machine_the_choice_is_allowed_and_nearly_the_best_tried(
    each_ms: list[float], latency_s: float, most: int
) -> None:
    cost = dict(zip(SIZES, each_ms, strict=True))
    sizes = BatchSizes(latency_s=latency_s, fits=lambda _kind, rows: rows <= most)
    for rows in learn(sizes, lambda rows: cost[rows] * rows * 1e-3):
        assert rows == 1 or rows <= most
    best = sizes.best(KIND)
    allowed = {
        rows: rate
        for rows, rate in sizes.rates(KIND).items()
        if rows == 1 or rows / rate <= latency_s
    }
    assert allowed[best] * 1.051 >= max(allowed.values())


@pytest.mark.parametrize("waiting", [1, 2, 5])
def test_small_loads_never_try_what_they_do_not_fill(waiting: int) -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    chosen = learn(sizes, lambda rows: rows * 1e-3, waiting=waiting)
    assert max(chosen) <= waiting


def test_steps_too_short_to_be_measured_are_known_too() -> None:
    sizes = BatchSizes(latency_s=10, fits=everything_fits)
    learn(sizes, lambda _rows: 0.0)
    assert sizes.untried(KIND) is None
    assert sizes.best(KIND) == 128
