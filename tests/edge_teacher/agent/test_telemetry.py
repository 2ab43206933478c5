"""What is told of a machine, and where it comes from when /sys leaves something open."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from edge_teacher.agent.telemetry import Machines
from edge_teacher.agent.throttling import ThrottleState
from edge_teacher.memory import limit_bytes, resident_bytes
from tests.edge_teacher.agent.jetsons import orin, processes, thor, write
from tests.edge_teacher.agent.test_tegrastats import ORIN, printing


def test_an_orin_tells_all_without_tegrastats(tmp_path: Path) -> None:
    command = printing(tmp_path, f"echo '{ORIN}'")
    machines = Machines(
        sysfs=orin(tmp_path / "sys"), proc=processes(tmp_path / "proc"), tegrastats=command
    )
    machines.start()
    machine = machines.read()
    machines.stop()
    assert not (tmp_path / "calls").exists()  # a process per device would be asked for nothing
    assert machine.temperature_c == 49.1
    assert machine.power_w["VDD_GPU_SOC"] == 2.386
    assert machine.gpu_load == 0.453
    assert machine.throttling == ThrottleState()
    assert machine.memory_available_bytes == 5 << 30
    assert machine.unavailable == {}


def test_what_sys_leaves_open_tegrastats_may_fill(tmp_path: Path) -> None:
    command = printing(tmp_path, f"echo '{ORIN}'", "exec sleep 60")
    machines = Machines(
        sysfs=thor(tmp_path / "sys"), proc=processes(tmp_path / "proc"), tegrastats=command
    )
    assert machines.read().unavailable == {
        "gpu_load": f"neither /sys nor {command} tells",
    }
    machines.start()
    end = time.monotonic() + 20
    while machines.read().gpu_load is None:
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    machine = machines.read()
    machines.stop()
    assert machine.gpu_load == 0.37
    assert machine.temperatures_c["tj"] == 55.1  # /sys goes first
    assert machine.unavailable == {}


def test_what_nothing_tells_is_said_with_its_reason(tmp_path: Path) -> None:
    machines = Machines(sysfs=tmp_path, proc=tmp_path, tegrastats="no-such-command")
    machine = machines.read()
    assert machine.temperature_c is None
    assert machine.rss_bytes == 0
    assert set(machine.unavailable) == {
        "temperatures_c",
        "power_w",
        "gpu_load",
        "throttled",
        "memory_available_bytes",
    }
    assert "no-such-command is not installed" in machine.unavailable["gpu_load"]


GROUP = "fs/cgroup/system.slice/edge-teacher.service"


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/system.slice/edge-teacher.service", {f"{GROUP}/memory.max": 1 << 30}, 1 << 30),
        # The group around it may allow less.
        (
            "0::/system.slice/edge-teacher.service",
            {f"{GROUP}/memory.max": "max", "fs/cgroup/system.slice/memory.max": 1 << 29},
            1 << 29,
        ),
        ("0::/system.slice/edge-teacher.service", {f"{GROUP}/memory.max": "max"}, None),
        # In a container the group's own folder is what is mounted.
        ("0::/docker/abc", {"fs/cgroup/memory.max": 1 << 28}, 1 << 28),
        (
            "12:memory:/docker\n0::/",
            {"fs/cgroup/memory/docker/memory.limit_in_bytes": 1 << 30},
            1 << 30,
        ),
        (
            "12:memory:/docker",
            {"fs/cgroup/memory/docker/memory.limit_in_bytes": 9223372036854771712},
            None,
        ),
    ],
)
def test_the_limit_is_of_the_control_group(
    cgroup: str, files: dict[str, object], limit: int | None, tmp_path: Path
) -> None:
    proc = processes(tmp_path / "proc", cgroup)
    assert limit_bytes(proc, write(tmp_path, files) / "fs" / "cgroup") == limit
    assert resident_bytes(proc) == 25600 * os.sysconf("SC_PAGE_SIZE")
    assert resident_bytes(proc / "none") == 0
