"""Whether this machine is throttled: seen in sysfs, said, and answered by asking less of it.

What is read, all below one folder (/sys):
- `class/thermal/thermal_zone*`: a temperature at or above a `passive`, `hot` or `critical` trip point
  (Documentation/driver-api/thermal/sysfs-api.rst). A passive trip that only turns a fan, or only warns of
  a hot surface (70 °C on a Jetson), slows nothing down and does not count.
- `class/thermal/cooling_device*`: one that holds clocks down, in a state above 0.
- `devices/system/cpu/cpu*/thermal_throttle/*_throttle_count` (x86): a count that has grown.
- `class/hwmon/hwmon*/oc*_event_cnt` (Jetson Orin and Thor): over-current and under-voltage events that have
  grown. They are said, and nothing else: their cause is the power supply, which no pause makes larger.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
COOL_S = 10.0
"""It counts as throttled until nothing has shown it for so long."""
_LEAST_HYSTERESIS_C = 3.0
_NO_COOLING = ("fan", "hot-surface-alert")
"""Cooling devices that hold no clock down."""
_MOST_PAUSE = 3.0
"""Pauses are at most so many times as long as the work between them: a quarter of the load is left."""
_FIRST_PAUSE = 0.25


@dataclass(frozen=True)
class ThrottleState:
    """`reason`: what shows it, in words; also of over-current events alone, which slow nothing here."""

    throttled: bool = False
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
        self._last_shown = 0.0
        self._state = ThrottleState()
        self._pause = 0.0
        self._counts = self._throttle_counts()
        self._events = self._over_current_events()

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
        hot = list(self._hot_zones(held=self._state.throttled))
        shown = [words for words, _ in hot]
        shown += self._cooling()
        counts = self._throttle_counts()
        if counts > self._counts:
            shown.append(f"the processor was throttled {counts - self._counts} times")
        events = self._over_current_events()
        power = events - self._events
        self._counts, self._events = counts, events
        if shown:
            self._last_shown = now
            self._pause = min(_MOST_PAUSE, max(_FIRST_PAUSE, self._pause * 2))
        else:
            self._pause = self._pause / 2 if self._pause > _FIRST_PAUSE / 2 else 0.0
        before = self._state
        still = before.throttled and now - self._last_shown < self._cool_s
        reason = "; ".join(shown)
        if still and not shown:
            reason = f"until lately: {before.reason.removeprefix('until lately: ')}"
        if power > 0:
            events_said = f"{power} over-current or under-voltage events"
            reason = f"{reason}; {events_said}" if reason else events_said
        self._state = ThrottleState(
            throttled=bool(shown) or still, reason=reason, refuses=any(far for _, far in hot)
        )
        if self._state.throttled != before.throttled:
            log.warning(
                "throttled, and working slower: %s"
                if self._state.throttled
                else "no longer throttled%s",
                reason if self._state.throttled else "",
            )

    def _hot_zones(self, *, held: bool) -> Iterator[tuple[str, bool]]:
        """(what to say, whether it is past a `hot` or `critical` trip) of each zone that is too hot.

        `held`: it was throttled before, so a trip counts until the temperature is clearly below it.
        """
        for zone in sorted(self._sysfs.glob("class/thermal/thermal_zone*")):
            temperature = _number(zone / "temp")
            # A sensor without power reads -256 °C on a Jetson.
            if temperature is None or not -50_000 < temperature < 200_000:
                continue
            reached = []
            for kind_file in zone.glob("trip_point_*_type"):
                kind = _text(kind_file)
                index = kind_file.name.split("_")[2]
                trip = _number(zone / f"trip_point_{index}_temp")
                if kind not in ("passive", "hot", "critical") or trip is None or trip <= 0:
                    continue
                if kind == "passive" and not self._slows_down(zone, index):
                    continue
                below = _number(zone / f"trip_point_{index}_hyst") or 0
                margin = max(below, int(_LEAST_HYSTERESIS_C * 1000)) if held else 0
                if temperature >= trip - margin:
                    reached.append((trip, kind))
            if reached:
                trip, kind = max(reached)
                yield (
                    f"{_text(zone / 'type') or zone.name} has {temperature / 1000:.0f} °C, and its {kind} "
                    f"trip point is {trip / 1000:.0f} °C",
                    any(kind != "passive" and temperature >= trip for trip, kind in reached),
                )

    def _slows_down(self, zone: Path, index: str) -> bool:
        """Whether a trip is bound to something that holds clocks down; where nothing is bound, it counts."""
        bound = [
            _text(point.parent / point.name.removesuffix("_trip_point") / "type")
            for point in zone.glob("cdev*_trip_point")
            if _text(point) == index
        ]
        return not bound or any(_holds_clocks(kind) for kind in bound)

    def _cooling(self) -> list[str]:
        found = []
        for device in sorted(self._sysfs.glob("class/thermal/cooling_device*")):
            kind, state = _text(device / "type"), _number(device / "cur_state")
            if state and _holds_clocks(kind):
                most = _number(device / "max_state")
                found.append(f"{kind} is in state {state}" + (f" of {most}" if most else ""))
        return found

    def _throttle_counts(self) -> int:
        counts = self._sysfs.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
        return sum(_number(count) or 0 for count in counts)

    def _over_current_events(self) -> int:
        return sum(_number(c) or 0 for c in self._sysfs.glob("class/hwmon/hwmon*/oc*_event_cnt"))


def _holds_clocks(kind: str) -> bool:
    return bool(kind) and not any(word in kind for word in _NO_COOLING)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""  # a zone may be switched off, and then refuses to be read


def _number(path: Path) -> int | None:
    with contextlib.suppress(ValueError):
        return int(_text(path))
    return None
