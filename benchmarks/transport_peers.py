"""What the transport is measured against, and the ends it is measured between: each a process of its own.

python -m benchmarks.transport_peers ROLE PORT…   says "ready" and runs until its standard input closes
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np

from edge_teacher.contract.limits import MIB, Limits
from edge_teacher.contract.messages import Wire
from edge_teacher.rpc.address import parse_broker
from edge_teacher.rpc.pair import connect_pair
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors

DEVICE = "d1"
GRPC_METHOD = "/fedsa.Bench/Give"
_PIECE = MIB


class Give(Wire, frozen=True):
    """Asks for an answer of `count` bytes; `fresh`: made for it and not kept, as an answer is."""

    count: int
    pad: str = ""
    """Makes the request as long as its peers'."""
    fresh: bool = False
    reset_peak: bool = False
    tell: bool = False
    """Asks what memory the device takes."""


class Given(Wire, frozen=True):
    rss_bytes: int = 0
    peak_bytes: int = 0


def memory_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """`VmHWM` counts from now on."""
    Path("/proc/self/clear_refs").write_text("5")


_KEPT: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}


def noise(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if count not in _KEPT:
        _KEPT[count] = np.frombuffer(os.urandom(count), np.uint8)
    return _KEPT[count]


def give(request: Give, _tensors: Tensors) -> Answer:
    if request.reset_peak:
        reset_peak()
    # Asking the kernel takes an eighth of a round trip: only where somebody wants to know.
    told = Given()
    if request.tell:
        told = Given(rss_bytes=memory_bytes("VmRSS"), peak_bytes=memory_bytes("VmHWM"))
    data = np.full(request.count, 7, np.uint8) if request.fresh else noise(request.count)
    return told, {"data": data}


def device(url: str) -> Callable[[], None]:
    pair = connect_pair(parse_broker(url), DEVICE)
    limits = Limits(answer_cache_bytes=MIB)
    server = Server(
        pair.control, DEVICE, {"give": Method(Give, give)}, limits=limits, workers=2, bulk=pair.bulk
    )
    server.start()

    def stop() -> None:
        server.drain()
        pair.close()

    return stop


def grpc_server(port: str) -> Callable[[], None]:
    import grpc

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
        def service(self, _call: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(self._give)

        def _give(self, request: bytes, _context: Any) -> bytes:
            return noise(struct.unpack("<Q", request[:8])[0]).tobytes()

    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()], options=options)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return lambda: server.stop(0).wait()


def _accept(port: int, serve: Callable[[socket.socket], None]) -> Callable[[], None]:
    listener = socket.create_server(("127.0.0.1", port))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return listener.close


def tcp_server(port: str) -> Callable[[], None]:
    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := connection.recv(8, socket.MSG_WAITALL):
                connection.sendall(noise(struct.unpack("<Q", request)[0]).data)

    return _accept(int(port), serve)


def tcp_relay(port: str, upstream: str) -> Callable[[], None]:
    """The physical limit of a design with a broker: every byte goes over two sockets."""

    def serve(connection: socket.socket) -> None:
        onward = socket.create_connection(("127.0.0.1", int(upstream)))
        onward.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            buffer = memoryview(bytearray(_PIECE))
            with contextlib.suppress(OSError):
                while count := source.recv_into(buffer):
                    sink.sendall(buffer[:count])

        threading.Thread(target=pump, args=(connection, onward), daemon=True).start()
        pump(onward, connection)

    return _accept(int(port), serve)


ROLES: dict[str, Callable[..., Callable[[], None]]] = {
    "device": device,
    "grpc": grpc_server,
    "tcp": tcp_server,
    "relay": tcp_relay,
}


@contextmanager
def running(role: str, *arguments: str, within: tuple[str, ...] = ()) -> Iterator[Popen[bytes]]:
    """A peer as a process, ready; `within`: a command to run it through."""
    command = [*within, sys.executable, "-m", "benchmarks.transport_peers", role, *arguments]
    process = Popen(command, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise RuntimeError(f"{' '.join(command)} did not come up")
        yield process
    finally:
        process.communicate()


def main() -> None:
    stop = ROLES[sys.argv[1]](*sys.argv[2:])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    stop()


if __name__ == "__main__":
    main()
