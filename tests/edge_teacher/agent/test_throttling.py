"""Real folders as sysfs shows them; the thermal zones of an Orin are laid out as on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_teacher.agent.throttling import (
    COOL_S,
    EVENT_LASTS_S,
    LOOK_EVERY_S,
    ThrottleState,
    Throttling,
)
from tests.edge_teacher.agent import jetsons


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 100.0

    def write(self, path: str, **files: object) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")

    def zone(self, number: int = 0, **files: object) -> None:
        self.write(f"class/thermal/thermal_zone{number}", **files)

    def throttling(self) -> Throttling:
        return Throttling(self.root, clock=lambda: self.now)

    def after(self, seconds: float = LOOK_EVERY_S) -> None:
        self.now += seconds


@pytest.fixture
def orin(tmp_path: Path) -> Machine:
    """One zone of a Jetson Orin: 70 °C only warns of a hot surface, 99 °C holds clocks down."""
    machine = Machine(tmp_path)
    machine.zone(
        type="cpu-thermal",
        temp=45000,
        trip_point_0_type="passive",
        trip_point_0_temp=99000,
        trip_point_0_hyst=0,
        trip_point_1_type="critical",
        trip_point_1_temp=104500,
        trip_point_2_type="passive",
        trip_point_2_temp=70000,
        trip_point_2_hyst=8000,
        trip_point_3_type="active",
        trip_point_3_temp=51000,
        cdev0_trip_point=0,
        cdev1_trip_point=2,
    )
    machine.write("class/thermal/cooling_device0", type="cpufreq-cpu0", cur_state=0, max_state=20)
    machine.write(
        "class/thermal/cooling_device1", type="hot-surface-alert", cur_state=1, max_state=1
    )
    machine.write("class/thermal/cooling_device2", type="pwm-fan", cur_state=3, max_state=3)
    zone = tmp_path / "class/thermal/thermal_zone0"
    (zone / "cdev0").symlink_to("../cooling_device0")
    (zone / "cdev1").symlink_to("../cooling_device1")
    return machine


def test_a_machine_that_shows_nothing_is_well(tmp_path: Path) -> None:
    throttling = Throttling(tmp_path)
    assert not throttling.shown
    assert not throttling.state.throttled
    assert throttling.pause_s(1.0) == 0


def test_neither_a_fan_nor_a_hot_surface_is_throttling(orin: Machine) -> None:
    orin.zone(temp=80000)
    assert orin.throttling().state.reason == ""


def test_a_trip_point_that_holds_clocks_down_is(orin: Machine) -> None:
    throttling = orin.throttling()
    assert not throttling.state.throttled
    orin.zone(temp=99500)
    assert not throttling.state.throttled  # it looks once a second
    orin.after()
    state = throttling.state
    assert state.throttled
    assert not state.refuses
    assert state.reason == "cpu-thermal has 100 °C, and its passive trip point is 99 °C"
    orin.zone(temp=105000)
    orin.after()
    assert throttling.state.refuses
    assert "critical" in throttling.state.reason


def test_a_cooling_device_that_is_on_is(orin: Machine) -> None:
    orin.write("class/thermal/cooling_device0", cur_state=4)
    assert orin.throttling().state.reason == "cpufreq-cpu0 is in state 4 of 20"


def test_a_count_of_the_processor_that_grows_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    place = "devices/system/cpu/cpu1/thermal_throttle"
    machine.write(place, core_throttle_count=7)
    throttling = machine.throttling()
    assert not throttling.state.throttled  # what was before the start is past
    machine.write(place, core_throttle_count=9)
    machine.after()
    assert throttling.state.reason == "the processor was throttled 2 times"


def test_over_current_is_said_for_a_minute_and_no_reason_to_pause(tmp_path: Path) -> None:
    machine = Machine(jetsons.orin(tmp_path))
    throttling = machine.throttling()
    assert throttling.state == ThrottleState()  # four events of last week are over
    machine.write("class/hwmon/hwmon3", oc2_event_cnt=5)
    machine.after()
    assert throttling.state == ThrottleState(throttled=True, reason="average over-current")
    assert throttling.pause_s(1.0) == 0
    machine.after(EVENT_LASTS_S - LOOK_EVERY_S)
    assert throttling.state.throttled
    machine.after()
    assert throttling.state == ThrottleState()


@pytest.mark.parametrize("board", [jetsons.orin, jetsons.thor])
def test_boards_that_are_well_say_so_and_are_slowed_by_each_of_their_devices(
    board: Callable[[Path], Path], tmp_path: Path
) -> None:
    machine = Machine(board(tmp_path))
    throttling = machine.throttling()
    assert throttling.shown
    assert throttling.state == ThrottleState()
    machine.write("class/thermal/cooling_device2", cur_state=1)
    machine.after()
    assert "devfreq" in throttling.state.reason
    assert throttling.pause_s(1.0) > 0


def test_heat_and_the_supply_are_said_together(tmp_path: Path) -> None:
    machine = Machine(jetsons.thor(tmp_path))
    machine.write("class/hwmon/hwmon9", name="soctherm_oc", oc1_event_cnt=0)
    throttling = machine.throttling()
    machine.write("class/hwmon/hwmon9", oc1_event_cnt=1)
    machine.write("class/thermal/cooling_device0", cur_state=1)
    machine.after()
    assert throttling.state.reason == "gpu-throttle-alert is in state 1 of 10; under-voltage"


def test_it_goes_down_by_steps_and_comes_back_by_steps(orin: Machine) -> None:
    throttling = orin.throttling()
    orin.zone(temp=99000)
    pauses = []
    for _ in range(7):
        orin.after()
        pauses.append(throttling.pause_s(1.0))
    assert pauses == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    orin.zone(temp=50000)
    pauses = []
    for _ in range(8):
        orin.after()
        pauses.append(throttling.pause_s(1.0))
    assert pauses == [1.5, 0.75, 0.375, 0.1875, 0.09375, 0.0, 0.0, 0.0]


def test_just_below_its_trip_point_it_stays_throttled_and_lately_is_not_yet_well(
    orin: Machine,
) -> None:
    throttling = orin.throttling()
    orin.zone(temp=99000)
    orin.after()
    assert throttling.state.throttled
    orin.zone(temp=97000)  # within the hysteresis
    for _ in range(int(3 * COOL_S)):
        orin.after()
        assert throttling.state.throttled
    orin.zone(temp=95000)
    orin.after()
    assert throttling.state.throttled
    assert throttling.state.reason.startswith("until lately: cpu-thermal has 97 °C")
    orin.after(COOL_S)
    assert throttling.state == ThrottleState()


def test_sensors_that_are_off_or_broken_are_passed_over(orin: Machine) -> None:
    orin.zone(1, type="gpu-thermal", temp=-256000, trip_point_0_type="passive", trip_point_0_temp=1)
    orin.zone(2, type="odd", temp="none", trip_point_0_type="hot", trip_point_0_temp=1)
    orin.zone(3, trip_point_0_type="hot")
    assert not orin.throttling().state.throttled
