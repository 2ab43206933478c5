from __future__ import annotations

import socket

import pytest

from edge_teacher.rpc.socket_buffers import LARGE_BYTES, SMALL_BYTES, SocketBuffers


class Connection:
    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def setsockopt(self, level: int, name: int, value: int) -> None:
        assert level == socket.SOL_SOCKET
        self.sizes[name] = value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("edge_teacher.rpc.socket_buffers.time.monotonic", lambda: now[0])
    return now


def sizes_after(clock: list[float], bytes_per_s: float) -> set[int]:
    connection, buffers = Connection(), SocketBuffers()
    buffers.opened(connection)
    assert set(connection.sizes.values()) == {SMALL_BYTES}
    for _ in range(20):
        clock[0] += 524288 / bytes_per_s
        buffers.moved(524288)
    assert connection.sizes.keys() == {socket.SO_SNDBUF, socket.SO_RCVBUF}
    return set(connection.sizes.values())


@pytest.mark.parametrize(
    ("bytes_per_s", "size"),
    [(0.1e6, SMALL_BYTES), (1.25e6, SMALL_BYTES), (12e6, SMALL_BYTES), (100e6, LARGE_BYTES)],
)
def test_large_only_on_a_fast_link(clock: list[float], bytes_per_s: float, size: int) -> None:
    assert sizes_after(clock, bytes_per_s) == {size}


def test_a_link_that_becomes_slow_gets_small_ones_again(clock: list[float]) -> None:
    connection, buffers = Connection(), SocketBuffers()
    buffers.opened(connection)
    for speed, size in ((100e6, LARGE_BYTES), (1.25e6, SMALL_BYTES), (100e6, LARGE_BYTES)):
        for _ in range(20):
            clock[0] += 524288 / speed
            buffers.moved(524288)
        assert set(connection.sizes.values()) == {size}
    clock[0] += 60  # a pause says nothing of the link
    buffers.moved(524288)
    assert set(connection.sizes.values()) == {LARGE_BYTES}
    buffers.opened(connection)  # but another connection may be another link
    assert set(connection.sizes.values()) == {SMALL_BYTES}


def test_a_socket_that_refuses_is_left_as_it_is() -> None:
    buffers = SocketBuffers()
    buffers.opened(object())
    buffers.moved(524288)
