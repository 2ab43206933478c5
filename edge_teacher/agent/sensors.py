"""Temperatures, power and GPU load, as Linux on a Jetson shows them in /sys.

No vendor's tool is asked. Whatever a board does not show is missing, never zero. Paths and units are those of
L4T 35 to 39: thermal zones in m°C (Documentation/driver-api/thermal/sysfs-api.rst), INA3221 and INA238 power
monitors as hwmon in mV, mA and µW (Documentation/hwmon), and the GPU's load in per mille beside its devfreq.
What slows the device down is looked for in throttling.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_teacher.agent.sysfs import folders, millidegrees, number, text

_GPU_NODES = ("gv11b", "gp10b", "ga10b", "gpu")
"""What the device tree calls a Jetson's own GPU."""

_GPU_LOADS = ("devices/gpu.0/load", "devices/platform/gpu.0/load")
"""Where it is linked besides."""


class Sensors:
    """Reads anew at each call; a reading takes a millisecond or two. Thread-safe."""

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        self._sysfs = sysfs

    def temperatures_c(self) -> dict[str, float]:
        """By zone. Zones whose part is switched off are left out: reading them fails, or gives -256."""
        found: dict[str, float] = {}
        for zone in folders(self._sysfs / "class" / "thermal", "thermal_zone"):
            value = millidegrees(zone)
            if value is not None:
                name = text(zone / "type") or zone.name
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
        for folder in folders(self._sysfs / "class" / "devfreq"):
            if text(folder / "device" / "of_node" / "name") in _GPU_NODES:
                load = number(folder / "device" / "load")
                if load is not None:
                    return min(1.0, max(0.0, load / 1000))
        for place in _GPU_LOADS:
            load = number(self._sysfs / place)
            if load is not None:
                return min(1.0, max(0.0, load / 1000))
        return None

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _monitors(self, name: str) -> Iterator[Path]:
        """hwmon folders by what they are: their numbers change from boot to boot."""
        for folder in folders(self._sysfs / "class" / "hwmon", "hwmon"):
            if text(folder / "name").startswith(name):
                yield folder


def _rails(monitor: Path) -> Iterator[tuple[int, str]]:
    """(channel, name). A monitor of one rail has its name in `label`."""
    labels = sorted(monitor.glob("in*_label"))
    for path in labels:
        number = path.name.removeprefix("in").removesuffix("_label")
        name = text(path)
        if number.isdigit() and name and name != "NC":
            yield int(number), name
    if not labels and (name := text(monitor / "label")):
        yield 1, name


def _watts(monitor: Path, channel: int) -> float | None:
    power = number(monitor / f"power{channel}_input")
    if power is not None:
        return power / 1e6
    volts = number(monitor / f"in{channel}_input")
    amperes = number(monitor / f"curr{channel}_input")
    return None if volts is None or amperes is None else volts * amperes / 1e6


def _add(found: dict[str, float], name: str, value: float) -> None:
    """Two sensors of one name are both told."""
    unique, again = name, 2
    while unique in found:
        unique, again = f"{name}-{again}", again + 1
    found[unique] = value
