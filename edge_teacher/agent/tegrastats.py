"""NVIDIA's tegrastats, for what a board's kernel does not show: read as a stream, and never relied on.

Its lines differ between boards and releases, in which fields there are as well as in their spelling: each
field is looked for by itself, and one that is not there is missing. Orin and Xavier say `GR3D_FREQ 45%@[…]`,
Thor `GR3D_FREQ @[…]` or nothing: then the GPU's load is not known.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_teacher.rpc.backoff import Backoff

log = logging.getLogger(__name__)

_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*)@(-?\d+(?:\.\d+)?)C(?!\S)")
_POWER = re.compile(r"(?<!\S)([A-Z][A-Za-z0-9_]*) (-?\d+)mW")
_GPU_LOAD = re.compile(r"(?<!\S)GR3D_FREQ (\d+)%")

_LONGEST_LINE = 8192
_SETTLED_S = 60.0
"""A process that has lasted for so long is started again soon."""
_STALE_AFTER = 3
"""Intervals without a line, after which the last one says nothing about now."""


@dataclass(frozen=True)
class Line:
    """What one line says, in the units and under the names of `Sensors`."""

    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_w: dict[str, float] = field(default_factory=dict)
    gpu_load: float | None = None


def parse(line: str) -> Line:
    """Never fails: what is not understood is left out."""
    load = _GPU_LOAD.search(line)
    return Line(
        temperatures_c={
            name.lower(): float(value)
            for name, value in _TEMPERATURE.findall(line)
            if -50 < float(value) < 200  # a part without power reads -256
        },
        # "NC" is a channel that is not connected.
        power_w={name: int(mw) / 1000 for name, mw in _POWER.findall(line) if name != "NC"},
        gpu_load=None if load is None else min(1.0, int(load[1]) / 100),
    )


class Tegrastats:
    """One process that prints a line per interval, started again if it ends, later each time."""

    def __init__(
        self,
        command: str = "tegrastats",
        *,
        interval_s: float = 5.0,
        retry: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = shutil.which(command)
        self._interval_s = interval_s
        self._retry = retry or Backoff(first_s=1.0, longest_s=300.0)
        self._clock = clock
        self._lock = threading.Lock()
        self._latest: tuple[float, Line] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tegrastats", daemon=True)

    @property
    def installed(self) -> bool:
        return self._command is not None

    def start(self) -> None:
        """Without the command installed there is nothing to start."""
        if self.installed:
            self._thread.start()

    def latest(self) -> Line | None:
        """The newest line, if it is recent."""
        with self._lock:
            if self._latest is None:
                return None
            at, line = self._latest
        return line if self._clock() - at < _STALE_AFTER * self._interval_s else None

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()
            process = self._process
        if process is not None:
            process.kill()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._read()
            except (OSError, ValueError) as error:
                log.warning("%s cannot be read: %s", self._command, error)
            self._stopped.wait(self._retry.next_s())

    def _read(self) -> None:
        assert self._command is not None
        with self._lock:
            if self._stopped.is_set():
                return
            self._process = process = subprocess.Popen(
                [self._command, "--interval", str(int(self._interval_s * 1000))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        began = self._clock()
        try:
            assert process.stdout is not None
            while line := process.stdout.readline(_LONGEST_LINE):
                found = parse(line)
                with self._lock:
                    self._latest = (self._clock(), found)
            if self._clock() - began > _SETTLED_S:
                self._retry.reset()
        finally:
            with contextlib.suppress(OSError):
                process.kill()
            process.communicate()
