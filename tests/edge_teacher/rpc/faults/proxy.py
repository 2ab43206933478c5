"""A TCP proxy that is slow, cuts every connection now and then, or leads nowhere for a while."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class CuttingProxy:
    """Between a client and a broker at `port`: `bytes_per_s` each way, everything cut every `cut_s`."""

    def __init__(self, port: int, *, bytes_per_s: float, cut_s: float | None = None) -> None:
        self._target = port
        self._rate = bytes_per_s
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        self.refused = 0
        self._down = False
        threading.Thread(target=self._accept, daemon=True).start()
        if cut_s is not None:
            threading.Thread(target=self._cut, args=(cut_s,), daemon=True).start()

    def go_down(self) -> None:
        """Cut everything, and hang up on who connects."""
        self._down = True
        self._cut_all()

    def come_up(self) -> None:
        self._down = False

    def close(self) -> None:
        self._over.set()
        self._listener.close()
        self._cut_all()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
                if self._down:
                    client.close()
                    self.refused += 1
                    continue
                broker = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with self._lock:
                self._open += [client, broker]
            for source, sink in ((client, broker), (broker, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(64 * 1024):
                sink.sendall(data)
                due = max(due, time.monotonic() - 0.05) + len(data) / self._rate
                if (early := due - time.monotonic()) > 0:
                    self._over.wait(early)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            self._cut_all()
            self.cuts += 1

    def _cut_all(self) -> None:
        with self._lock:
            ended, self._open = self._open, []
        for end in ended:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
