"""Lines as boards print them (values changed), and a process that prints them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from edge_teacher.agent.tegrastats import Line, Tegrastats, parse
from edge_teacher.rpc.backoff import Backoff

ORIN = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) "
    "CPU [14%@2188,5%@2112,off,off] EMC_FREQ 3%@2133 GR3D_FREQ 37%@[611,611] NVENC off VIC off "
    "APE 174 cpu@52.562C soc2@48.437C tj@52.562C CV0@-256C VDD_GPU_SOC 2412mW/2412mW "
    "VDD_CPU_CV 1607mW/1610mW VIN_SYS_5V0 4707mW/4707mW NC 0mW/0mW"
)
XAVIER = (
    "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,off,off] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 99%@[510] VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C GPU@37.5C "
    "VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 696mW/696mW"
)
THOR = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 "
    "GR3D_FREQ @[314,314,314] VIC off cpu@37.343C tj@38.875C gpu@38.875C VDD_GPU -392mW/1962mW "
    "VIN 19780mW/19780mW"
)
THOR_7_2 = (
    "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) CPU [2%@972,1%@972] cpu@60.406C "
    "gpu@62.906C VDD_GPU 37528mW/37528mW/37528mW VIN 87426mW/43713mW/87426mW"
)


@pytest.mark.parametrize(
    ("line", "temperatures", "power", "load"),
    [
        (
            ORIN,
            {"cpu": 52.562, "soc2": 48.437, "tj": 52.562},
            {"VDD_GPU_SOC": 2.412, "VDD_CPU_CV": 1.607, "VIN_SYS_5V0": 4.707},
            0.37,
        ),
        (
            XAVIER,
            {"aux": 39, "cpu": 39.5, "gpu": 37.5},
            {"VDD_IN": 5.079, "VDD_CPU_GPU_CV": 0.696},
            0.99,
        ),
        # Thor says at which frequency, and not how busy: that is no load of zero.
        (
            THOR,
            {"cpu": 37.343, "tj": 38.875, "gpu": 38.875},
            {"VDD_GPU": -0.392, "VIN": 19.78},
            None,
        ),
        (THOR_7_2, {"cpu": 60.406, "gpu": 62.906}, {"VDD_GPU": 37.528, "VIN": 87.426}, None),
        ("", {}, {}, None),
        ("tegrastats: command not found 5mW@ %@[", {}, {}, None),
    ],
    ids=["orin", "xavier", "thor", "thor 7.2", "empty", "garbage"],
)
def test_each_field_is_read_where_it_is(
    line: str, temperatures: dict[str, float], power: dict[str, float], load: float | None
) -> None:
    assert parse(line) == Line(temperatures, power, load)


def printing(folder: Path, *commands: str) -> str:
    """A command that does what a shell is told, as tegrastats would be run."""
    path = folder / "tegrastats"
    path.write_text("\n".join(["#!/bin/sh", 'echo "$@" >> ' + str(folder / "calls"), *commands]))
    path.chmod(0o755)
    return str(path)


def wait_for(stats: Tegrastats, wanted: float | None) -> None:
    end = time.monotonic() + 20
    while True:
        line = stats.latest()
        if (None if line is None else line.gpu_load) == wanted:
            return
        assert time.monotonic() < end, line
        threading.Event().wait(0.01)


def test_the_newest_line_of_a_running_process_counts(tmp_path: Path) -> None:
    command = printing(tmp_path, f"echo '{XAVIER}'", f"echo '{ORIN}'", "exec sleep 60")
    stats = Tegrastats(command, interval_s=2.5)
    stats.start()
    wait_for(stats, 0.37)
    assert (tmp_path / "calls").read_text() == "--interval 2500\n"
    process = stats._process
    assert process is not None
    stats.stop()
    assert process.poll() is not None  # no child is left behind


def test_one_that_ends_is_started_again_and_its_last_line_grows_old(tmp_path: Path) -> None:
    now = 0.0
    command = printing(tmp_path, f"echo '{ORIN}'", "exit 1")
    retry = Backoff(first_s=0.01, longest_s=0.02)
    stats = Tegrastats(command, interval_s=5, retry=retry, clock=lambda: now)
    stats.start()
    wait_for(stats, 0.37)
    end = time.monotonic() + 20
    while len((tmp_path / "calls").read_text().splitlines()) < 3:
        assert time.monotonic() < end
    stats.stop()
    assert stats.latest() is not None
    now = 15.1
    assert stats.latest() is None


def test_where_it_is_not_installed_nothing_runs(tmp_path: Path) -> None:
    stats = Tegrastats(str(tmp_path / "nowhere"))
    assert not stats.installed
    stats.start()
    assert stats.latest() is None
    stats.stop()
