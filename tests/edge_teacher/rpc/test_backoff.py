from __future__ import annotations

from edge_teacher.rpc.backoff import Backoff


def test_waits_double_to_a_bound_and_differ_between_devices() -> None:
    fleet = [Backoff(first_s=1, longest_s=15) for _ in range(200)]
    for span in (1, 2, 4, 8, 15, 15):
        waits = [device.next_s() for device in fleet]
        assert all(span / 2 <= wait <= span for wait in waits)
        # After a week without a broker they must not all come back in one moment.
        assert max(waits) - min(waits) > span / 4


def test_a_week_of_tries_neither_overflows_nor_grows() -> None:
    backoff = Backoff(first_s=0.5, longest_s=15)
    waits = [backoff.next_s() for _ in range(100_000)]
    assert sum(waits) > 7 * 86_400
    assert max(waits) <= 15


def test_success_makes_the_next_wait_short_again() -> None:
    backoff = Backoff(first_s=1, longest_s=60)
    for _ in range(10):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= 1
