from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator import processes

LISTEN = """
import signal, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def wait_until(true, what: str, deadline_s: float = 20) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Running: a zombie waits only for its parent, which in a container may never ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start(log: Path, *words: str) -> subprocess.Popen[bytes]:
    process = processes.start([sys.executable, "-c", LISTEN, *words], log)
    wait_until(lambda: "ready" in log.read_text(), "the child's start")
    return process


def test_a_child_ends_when_it_is_told_to(tmp_path: Path) -> None:
    children = [start(tmp_path / f"{i}.log") for i in range(2)]
    began = time.monotonic()
    processes.stop(children)
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2
    assert time.monotonic() - began < 5


def test_one_that_will_not_is_killed(tmp_path: Path) -> None:
    child = start(tmp_path / "log", "stubborn")
    processes.stop([child], grace_s=0.1)
    assert child.returncode == -signal.SIGKILL


def test_one_that_has_ended_is_no_trouble(tmp_path: Path) -> None:
    child = processes.start([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
    child.wait()
    processes.stop([child])
    assert child.returncode == 3


def test_output_and_environment(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['X'], flush=True); sys.exit('the last word')"
    processes.start([sys.executable, "-c", code], log, environment={"X": "given"}).wait()
    assert processes.last_words(log) == "given\nthe last word"
    assert processes.last_words(log, lines=1) == "the last word"
    assert processes.last_words(tmp_path / "none") == ""


def test_a_command_that_does_not_exist_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        processes.start(["/nowhere/at/all"], tmp_path / "log")


def test_a_ctrl_c_in_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    child = start(tmp_path / "log")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    processes.stop([child])


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
def test_children_of_a_killed_parent_end_too(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from coordinator import processes\n"
        f"child = processes.start([sys.executable, '-c', {LISTEN!r}], Path(sys.argv[1]))\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: "ready" in log.read_text(), "the child's start")
    assert alive(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not alive(pid), "the end of the orphan")
