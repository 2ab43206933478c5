"""Child processes that end when they are told to, and also when this process is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
"""Loaded here, for between fork and exec nothing may take a lock that another thread held."""


def start(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `command` with its output in `log`, in a session of its own.

    A Ctrl-C in the terminal reaches only this process, which then ends its children in good order. On
    Linux a child is also ended with the *thread* that started it: start it from one that lasts.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = 20) -> None:
    """SIGTERM to all, then SIGKILL to those that have not gone after `grace_s`, or at a second Ctrl-C."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + grace_s
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def last_words(log: Path, lines: int = 5) -> str:
    """The end of a log, for the sentence that says why a child died."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
