from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import edge_teacher
from edge_teacher.agent.signals import Signals


def test_signals_wait_until_somebody_asks() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.wait() == "reload"
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wait() == "stop"
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_storm_of_them_loses_no_wish_to_stop() -> None:
    """Also beyond what a pipe holds."""
    program = (
        "from edge_teacher.agent.signals import Signals\n"
        "with Signals() as s:\n"
        "    print('up', flush=True)\n"
        "    while s.wait() != 'stop': pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(edge_teacher.__file__).parents[1])},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
