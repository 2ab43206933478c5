"""Temperatures, power, GPU load and throttling, as Linux on a Jetson shows them in /sys.

No vendor's tool is asked. Whatever a board does not show is missing, never zero. Paths and units are those of
L4T 35 to 39: thermal zones in m°C and cooling devices (Documentation/driver-api/thermal/sysfs-api.rst),
INA3221 and INA238 power monitors as hwmon in mV, mA and µW (Documentation/hwmon), the GPU's load in per mille
beside its devfreq, and BPMP's over-current counters (`soctherm_oc`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_GPU_NODES = ("gv11b", "gp10b", "ga10b", "gpu")
"""What the device tree calls a Jetson's own GPU."""

_GPU_LOADS = ("devices/gpu.0/load", "devices/platform/gpu.0/load")
"""Where it is linked besides."""

_OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
_EVENT_LASTS_S = 60.0
"""The hardware counts events and does not say when they end: one counts as current for so long."""


@dataclass(frozen=True)
class Throttled:
    """Whether something slows this device down, and what."""

    active: bool
    reason: str = ""


class Sensors:
    """Reads anew at each call; a reading takes a millisecond or two. Thread-safe."""

    def __init__(
        self, sysfs: Path = Path("/sys"), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sysfs = sysfs
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: dict[str, int] = {}
        self._last_event: dict[str, float] = {}

    def temperatures_c(self) -> dict[str, float]:
        """By zone. Zones whose part is switched off are left out: reading them fails, or gives -256."""
        found: dict[str, float] = {}
        for zone in _folders(self._sysfs / "class" / "thermal", "thermal_zone"):
            value = _number(zone / "temp")
            if value is not None and -50_000 < value < 200_000:
                name = _text(zone / "type") or zone.name
                _add(
                    found,
                    name.lower().removesuffix("-thermal").removesuffix("_thermal"),
                    value / 1000,
                )
        return found

    def power_w(self) -> dict[str, float]:
        """By rail. Only channels with a current are rails: an INA3221 also labels sums of shunts."""
        found: dict[str, float] = {}
        for monitor in self._monitors("ina"):
            for channel, name in _rails(monitor):
                watts = _watts(monitor, channel)
                if watts is not None:
                    _add(found, name, watts)
        return found

    def gpu_load(self) -> float | None:
        """0 to 1; None where the kernel shows none, as on a Thor."""
        for folder in _folders(self._sysfs / "class" / "devfreq", ""):
            if _text(folder / "device" / "of_node" / "name").rstrip("\0") in _GPU_NODES:
                load = _number(folder / "device" / "load")
                if load is not None:
                    return min(1.0, max(0.0, load / 1000))
        for place in _GPU_LOADS:
            load = _number(self._sysfs / place)
            if load is not None:
                return min(1.0, max(0.0, load / 1000))
        return None

    def throttling(self) -> Throttled | None:
        """By heat: a cooling device that caps a frequency is above 0, or a throttle alert is raised. By the
        supply: an over-current counter has risen in the last minute. None where neither is shown."""
        caps = list(self._caps())
        events = list(self._over_current())
        if not caps and not events:
            return None
        reasons = [name for name, state in caps if state > 0] + [name for name, on in events if on]
        return Throttled(bool(reasons), ", ".join(reasons))

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _monitors(self, name: str) -> Iterator[Path]:
        """hwmon folders by what they are: their numbers change from boot to boot."""
        for folder in _folders(self._sysfs / "class" / "hwmon", "hwmon"):
            if _text(folder / "name").startswith(name):
                yield folder

    def _caps(self) -> Iterator[tuple[str, float]]:
        for device in _folders(self._sysfs / "class" / "thermal", "cooling_device"):
            kind = _text(device / "type")
            slows = kind.endswith("-throttle-alert") or "cpufreq" in kind or "devfreq" in kind
            state = _number(device / "cur_state") if slows else None
            if state is not None:
                yield kind, state

    def _over_current(self) -> Iterator[tuple[str, bool]]:
        for monitor in self._monitors("soctherm_oc"):
            for number, what in _OVER_CURRENT.items():
                count = _number(monitor / f"oc{number}_event_cnt")
                if count is not None:
                    yield what, self._has_risen(what, int(count))

    def _has_risen(self, what: str, count: int) -> bool:
        now = self._clock()
        with self._lock:
            before = self._counted.get(what, count)
            self._counted[what] = count
            if count > before:
                self._last_event[what] = now
            last = self._last_event.get(what)
        return last is not None and now - last < _EVENT_LASTS_S


def _rails(monitor: Path) -> Iterator[tuple[int, str]]:
    """(channel, name). A monitor of one rail has its name in `label`."""
    labels = sorted(monitor.glob("in*_label"))
    for path in labels:
        number = path.name.removeprefix("in").removesuffix("_label")
        name = _text(path)
        if number.isdigit() and name and name != "NC":
            yield int(number), name
    if not labels and (name := _text(monitor / "label")):
        yield 1, name


def _watts(monitor: Path, channel: int) -> float | None:
    power = _number(monitor / f"power{channel}_input")
    if power is not None:
        return power / 1e6
    volts = _number(monitor / f"in{channel}_input")
    amperes = _number(monitor / f"curr{channel}_input")
    return None if volts is None or amperes is None else volts * amperes / 1e6


def _add(found: dict[str, float], name: str, value: float) -> None:
    """Two sensors of one name are both told."""
    unique, again = name, 2
    while unique in found:
        unique, again = f"{name}-{again}", again + 1
    found[unique] = value


def _folders(parent: Path, prefix: str) -> list[Path]:
    try:
        found = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None  # a sensor of a part without power: reading it fails for as long as it has none
