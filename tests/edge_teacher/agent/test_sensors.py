from __future__ import annotations

from pathlib import Path

import pytest

from edge_teacher.agent.sensors import Sensors, Throttled
from tests.edge_teacher.agent.jetsons import orin, thor, write


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_orin(tmp_path: Path) -> None:
    sensors = Sensors(orin(tmp_path))
    # cv0 has no power: -256 is no temperature.
    assert sensors.temperatures_c() == {"cpu": 48.562, "gpu": 45.25, "tj": 49.1}
    assert sensors.power_w() == {
        "VDD_GPU_SOC": pytest.approx(2.3856),
        "VDD_CPU_CV": pytest.approx(0.79456),
    }
    assert sensors.gpu_load() == 0.453
    # A fan that turns and a warm surface slow nothing down, and four events of last week are over.
    assert sensors.throttling() == Throttled(active=False)


def test_a_thor(tmp_path: Path) -> None:
    sensors = Sensors(thor(tmp_path))
    assert sensors.temperatures_c() == {"cpu": 53.7, "soc012": 55.1, "tj": 55.1}
    assert sensors.power_w() == {"VDD_GPU": 6.0, "VIN": pytest.approx(16.802)}
    assert sensors.gpu_load() is None
    assert sensors.throttling() == Throttled(active=False)


def test_heat_slows_it_down_until_it_does_not(tmp_path: Path) -> None:
    sensors = Sensors(thor(tmp_path))
    write(tmp_path, {"class/thermal/cooling_device2/cur_state": 18})
    assert sensors.throttling() == Throttled(active=True, reason="devfreq-gpu-gpc-0")
    write(tmp_path, {"class/thermal/cooling_device0/cur_state": 1})
    assert sensors.throttling() == Throttled(
        active=True, reason="gpu-throttle-alert, devfreq-gpu-gpc-0"
    )
    for number in (0, 2):
        write(tmp_path, {f"class/thermal/cooling_device{number}/cur_state": 0})
    assert sensors.throttling() == Throttled(active=False)


def test_an_over_current_event_counts_for_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    sensors = Sensors(orin(tmp_path), clock=clock)
    assert sensors.throttling() == Throttled(active=False)
    write(tmp_path, {"class/hwmon/hwmon3/oc2_event_cnt": 5})
    assert sensors.throttling() == Throttled(active=True, reason="average over-current")
    clock.now = 59
    assert sensors.throttling() == Throttled(active=True, reason="average over-current")
    clock.now = 61
    assert sensors.throttling() == Throttled(active=False)


def test_a_machine_that_shows_nothing(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    assert sensors.temperatures_c() == {}
    assert sensors.power_w() == {}
    assert sensors.gpu_load() is None
    assert sensors.throttling() is None


def test_older_boards_link_the_load_elsewhere(tmp_path: Path) -> None:
    assert Sensors(write(tmp_path, {"devices/gpu.0/load": 1000})).gpu_load() == 1.0


def test_what_cannot_be_understood_is_left_out_and_sensors_of_one_name_are_both_told(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        {
            "class/thermal/thermal_zone0/type": "acpitz",
            "class/thermal/thermal_zone0/temp": 30000,
            "class/thermal/thermal_zone1/type": "acpitz",
            "class/thermal/thermal_zone1/temp": 31000,
            "class/thermal/thermal_zone2/temp": "hot",
            "class/thermal/thermal_zone10/temp": 32000,
            "class/hwmon/hwmon0/name": "ina3221",
            "class/hwmon/hwmon0/in1_label": "VDD",
            "class/hwmon/hwmon0/in1_input": "",
            "class/hwmon/hwmon0/curr1_input": 5,
        },
    )
    sensors = Sensors(tmp_path)
    assert sensors.temperatures_c() == {"acpitz": 30.0, "acpitz-2": 31.0, "thermal_zone10": 32.0}
    assert sensors.power_w() == {}
