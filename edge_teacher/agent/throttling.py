"""Whether this machine is throttled: seen in sysfs, said, and answered by asking less of it.

What is read, all below one folder (/sys):
- `class/thermal/thermal_zone*`: a temperature at or above a `passive`, `hot` or `critical` trip point
  (Documentation/driver-api/thermal/sysfs-api.rst). A passive trip that only turns a fan, or only warns of
  a hot surface (70 °C on a Jetson), slows nothing down and does not count.
- `class/thermal/cooling_device*`: one that holds clocks down, in a state above 0.
- `devices/system/cpu/cpu*/thermal_throttle/*_throttle_count` (x86): a count that has grown.
- `class/hwmon/hwmon*/oc*_event_cnt` of BPMP (`soctherm_oc`; Jetson Orin and Thor): over-current and
  under-voltage events that have grown. They are said, and no pause is made for them: their cause is the power
  supply, which no pause makes larger.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_teacher.agent.sysfs import folders, millidegrees, number, text

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
COOL_S = 10.0
"""It counts as throttled by heat until nothing has shown it for so long."""
EVENT_LASTS_S = 60.0
"""The hardware counts events and does not say when they end: one counts as current for so long."""
_LEAST_HYSTERESIS_C = 3.0
_TRIPS = ("passive", "hot", "critical")
_CLOCKS = ("cpufreq", "devfreq", "throttle-alert", "Processor")
"""What holds clocks down has one of these in its type. A fan has not, nor what only warns of a hot surface."""
_THROTTLE_COUNTS = "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
_OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
_MOST_PAUSE = 3.0
"""Pauses are at most so many times as long as the work between them: a quarter of the load is left."""
_FIRST_PAUSE = 0.25


@dataclass(frozen=True)
class ThrottleState:
    """`reason`: what shows it, in words."""

    throttled: bool = False
    """By heat, or by the power supply."""
    reason: str = ""
    refuses: bool = False
    """So hot that nothing new is begun."""


class Throttling:
    """Thread-safe. Looks at most once a second, when somebody asks."""

    def __init__(
        self,
        sysfs: Path = Path("/sys"),
        *,
        clock: Callable[[], float] = time.monotonic,
        cool_s: float = COOL_S,
    ) -> None:
        self._sysfs = sysfs
        self._clock = clock
        self._cool_s = cool_s
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._heat = ""
        """What last showed it."""
        self._heat_at: float | None = None
        self._state = ThrottleState()
        self._pause = 0.0
        self._counts = self._throttle_counts()
        self._events = self._over_current_events()
        self._event_at: dict[str, float] = {}

    @property
    def shown(self) -> bool:
        """Whether this machine shows any of it: without that, it cannot be known to be well."""
        return (
            bool(self._events)
            or any(True for _ in self._sysfs.glob(_THROTTLE_COUNTS))
            or any(True for _ in self._clock_states())
            or any(
                text(kind) in _TRIPS
                for zone in folders(self._sysfs / "class/thermal", "thermal_zone")
                if millidegrees(zone) is not None
                for kind in zone.glob("trip_point_*_type")
            )
        )

    @property
    def state(self) -> ThrottleState:
        with self._lock:
            now = self._clock()
            if self._looked_at is None or now - self._looked_at >= LOOK_EVERY_S:
                self._looked_at = now
                self._look(now)
            return self._state

    def pause_s(self, worked_s: float) -> float:
        """How long to leave the machine alone after so much work; 0 where it is well.

        Twice as long with each look that still shows throttling, and half as long with each that does
        not, so that the load goes down and comes back by steps.
        """
        _ = self.state
        return worked_s * self._pause

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _look(self, now: float) -> None:
        before = self._state
        hot = list(self._hot_zones(held=self._heat_at is not None))
        shown = [words for words, _ in hot]
        shown += [words for words, state in self._clock_states() if state > 0]
        counts = self._throttle_counts()
        if counts > self._counts:
            shown.append(f"the processor was throttled {counts - self._counts} times")
        self._counts = counts
        if shown:
            self._heat, self._heat_at = "; ".join(shown), now
            self._pause = min(_MOST_PAUSE, max(_FIRST_PAUSE, self._pause * 2))
        else:
            self._pause = self._pause / 2 if self._pause > _FIRST_PAUSE / 2 else 0.0
            if self._heat_at is not None and now - self._heat_at >= self._cool_s:
                self._heat_at = None
        reasons = (
            []
            if self._heat_at is None
            else [self._heat if shown else f"until lately: {self._heat}"]
        )
        reasons += self._events_lately(now)
        self._state = ThrottleState(
            throttled=bool(reasons), reason="; ".join(reasons), refuses=any(far for _, far in hot)
        )
        if self._state.throttled and not before.throttled:
            slower = "" if self._heat_at is None else ", and working slower"
            log.warning("throttled%s: %s", slower, self._state.reason)
        elif before.throttled and not self._state.throttled:
            log.warning("no longer throttled")

    def _events_lately(self, now: float) -> list[str]:
        events = self._over_current_events()
        for what, count in events.items():
            if count > self._events.get(what, count):
                self._event_at[what] = now
        self._events = events
        return [what for what, at in self._event_at.items() if now - at < EVENT_LASTS_S]

    def _hot_zones(self, *, held: bool) -> Iterator[tuple[str, bool]]:
        """(what to say, whether it is past a `hot` or `critical` trip) of each zone that is too hot.

        `held`: it was throttled before, so a trip counts until the temperature is clearly below it.
        """
        for zone in folders(self._sysfs / "class/thermal", "thermal_zone"):
            temperature = millidegrees(zone)
            if temperature is None:
                continue
            reached = []
            for kind_file in zone.glob("trip_point_*_type"):
                kind = text(kind_file)
                index = kind_file.name.split("_")[2]
                trip = number(zone / f"trip_point_{index}_temp")
                if kind not in _TRIPS or trip is None or trip <= 0:
                    continue
                if kind == "passive" and not self._slows_down(zone, index):
                    continue
                below = number(zone / f"trip_point_{index}_hyst") or 0
                margin = max(below, int(_LEAST_HYSTERESIS_C * 1000)) if held else 0
                if temperature >= trip - margin:
                    reached.append((trip, kind))
            if reached:
                trip, kind = max(reached)
                yield (
                    f"{text(zone / 'type') or zone.name} has {temperature / 1000:.0f} °C, and its {kind} "
                    f"trip point is {trip / 1000:.0f} °C",
                    any(kind != "passive" and temperature >= trip for trip, kind in reached),
                )

    def _slows_down(self, zone: Path, index: str) -> bool:
        """Whether a trip is bound to something that holds clocks down; where nothing is bound, it counts."""
        bound = [
            text(point.parent / point.name.removesuffix("_trip_point") / "type")
            for point in zone.glob("cdev*_trip_point")
            if text(point) == index
        ]
        return not bound or any(_holds_clocks(kind) for kind in bound)

    def _clock_states(self) -> Iterator[tuple[str, int]]:
        """(what to say, state) of each cooling device that holds clocks down, or could."""
        for device in folders(self._sysfs / "class/thermal", "cooling_device"):
            kind, state = text(device / "type"), number(device / "cur_state")
            if state is not None and _holds_clocks(kind):
                most = number(device / "max_state")
                yield f"{kind} is in state {state}" + (f" of {most}" if most else ""), state

    def _throttle_counts(self) -> int:
        return sum(number(count) or 0 for count in self._sysfs.glob(_THROTTLE_COUNTS))

    def _over_current_events(self) -> dict[str, int]:
        """Counts since the boot, by what they are."""
        found: dict[str, int] = {}
        for monitor in folders(self._sysfs / "class/hwmon", "hwmon"):
            if text(monitor / "name").startswith("soctherm_oc"):
                for index, what in _OVER_CURRENT.items():
                    count = number(monitor / f"oc{index}_event_cnt")
                    if count is not None:
                        found[what] = found.get(what, 0) + count
        return found


def _holds_clocks(kind: str) -> bool:
    return any(word in kind for word in _CLOCKS)
