"""The whole path with three agents as real processes over a real broker, on small settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.report import Report, read_report
from tests.examples import FAST, ROOT, three_teachers

FEDSA = [sys.executable, "-m", "coordinator.cli"]


def children_of(folder: Path) -> list[int]:
    """Processes whose command line mentions `folder`: the demo's broker and agents."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if str(folder).encode() in command and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def agents_of(folder: Path) -> list[int]:
    return [pid for pid in children_of(folder) if b"edge_teacher" in cmdline(pid)]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[list[str]]:
    examples = three_teachers(tmp_path)
    yield [
        *FEDSA,
        "demo",
        *("--examples", str(examples), "--runs", str(tmp_path / "runs")),
        *FAST,
    ]
    assert not children_of(tmp_path), "the demo left processes running"


def wait_for(what: str, condition: object, process: subprocess.Popen[str]) -> None:
    assert callable(condition)
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("broker", ["mosquitto", "iotcore"])
def test_teachers_select_teach_and_get_the_student_back(
    demo: list[str], tmp_path: Path, broker: str
) -> None:
    running = subprocess.Popen(
        [*demo, "--broker", broker, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    wait_for("the agents' start", lambda: len(agents_of(tmp_path)) == 3, running)
    out, err = running.communicate(timeout=500)
    assert running.returncode == 0, err
    assert broker in err

    report = msgspec.json.decode(out, type=Report)
    latest = tmp_path / "runs" / "latest"
    assert msgspec.json.decode((latest / "report.json").read_bytes(), type=Report) == report
    assert (latest / "report.html").stat().st_size > 10_000
    assert report.broker is not None
    assert report.broker.startswith(broker)

    ids = {t.id for t in report.teachers}
    assert len(ids) == 3
    selected = {t.id for t in report.teachers if t.selected}
    assert len(selected) == 2
    accuracy = report.accuracy
    for value in (accuracy.scratch, accuracy.fedsa_fp32, accuracy.fedsa_int8):
        assert value is not None
        assert 0 < value <= 1
    # Every device answers with the INT8 student that was measured on the workstation.
    assert accuracy.deployed is not None
    assert set(accuracy.deployed) == ids
    for deployed in accuracy.deployed.values():
        assert deployed == pytest.approx(accuracy.fedsa_int8, abs=0.002)

    # Only the selected were asked for features; everyone for saliency, and got the student.
    for device, methods in report.bytes_on_wire.items():
        assert ("features" in methods) == (device in selected)
        assert methods["saliency"].received > 0
        assert methods["student.offer"].sent > 100_000
    assert {"export", "roll-out", "ask devices"} <= report.seconds.keys()


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.timeout(300)
def test_no_agent_process_has_torch_loaded(demo: list[str], tmp_path: Path) -> None:
    """And Ctrl-C in the middle of the run ends everything, with its own exit code."""
    running = subprocess.Popen(
        demo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )

    def serving() -> bool:
        logs = list((tmp_path / "runs").glob("*/devices/*/agent.log"))
        return len(logs) == 3 and all("serves" in log.read_text() for log in logs)

    wait_for("three births", serving, running)
    agents = agents_of(tmp_path)
    assert len(agents) == 3
    for pid in agents:
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "onnxruntime" in loaded
        for forbidden in ("libtorch", "site-packages/torch", "site-packages/onnx/"):
            assert forbidden not in loaded
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs" / "latest").exists()


@pytest.mark.timeout(300)
def test_a_teacher_that_dies_while_the_run_is_on_is_named_and_the_others_teach(
    demo: list[str], tmp_path: Path
) -> None:
    running = subprocess.Popen(
        demo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stderr is not None
    begun = next((line for line in running.stderr if "warm-up" in line), None)
    assert begun is not None, running.communicate()
    victim = next(pid for pid in children_of(tmp_path) if b"--device\0device-b\0" in cmdline(pid))
    os.kill(victim, signal.SIGKILL)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, err
    assert "Traceback" not in err
    assert "Set aside: device-b" in err
    assert "Set aside: device-b, at saliency: device-b went offline" in out
    report = read_report(tmp_path / "runs" / "latest")
    assert [lost.teacher for lost in report.lost] == ["device-b"]
    assert {t.id for t in report.teachers} == {"device-a", "device-c"}
    assert report.accuracy.deployed is not None
    assert report.accuracy.deployed.keys() == {"device-a", "device-c"}
