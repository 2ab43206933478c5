"""How a device is, put together from the kernel, tegrastats where it must be, and the agent itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_teacher.agent.memory import read_memory
from edge_teacher.agent.sensors import Sensors, Throttled
from edge_teacher.agent.tegrastats import Line, Tegrastats


@dataclass(frozen=True)
class Machine:
    """What was found out about the machine at one moment; `unavailable`: what was not, and why."""

    load_1min: float
    rss_bytes: int
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    temperatures_c: dict[str, float]
    power_w: dict[str, float]
    gpu_load: float | None
    throttling: Throttled | None
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def temperature_c(self) -> float | None:
        """Of the hottest zone."""
        return max(self.temperatures_c.values(), default=None)


class Machines:
    """Reads this machine. /sys goes first; tegrastats runs only where /sys leaves something open."""

    def __init__(
        self,
        *,
        sysfs: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        tegrastats: str = "tegrastats",
        interval_s: float = 5.0,
        throttling: Callable[[], Throttled | None] | None = None,
    ) -> None:
        """`throttling`: who watches for it; None: what `Sensors` sees at the moment of asking."""
        self._proc = proc
        self._cgroups = sysfs / "fs" / "cgroup"
        self._sensors = Sensors(sysfs)
        self._throttling = throttling or self._sensors.throttling
        self._tegrastats: Tegrastats | None = None
        self._why = f"/sys does not tell, and {tegrastats} is not installed"
        if self._open():
            found = Tegrastats(tegrastats, interval_s=interval_s)
            if found.installed:
                self._tegrastats = found
                self._why = f"neither /sys nor {tegrastats} tells"

    def start(self) -> None:
        if self._tegrastats is not None:
            self._tegrastats.start()

    def stop(self) -> None:
        if self._tegrastats is not None:
            self._tegrastats.stop()

    def read(self) -> Machine:
        line = (self._tegrastats.latest() if self._tegrastats else None) or Line()
        memory = read_memory(self._proc, self._cgroups)
        temperatures = self._sensors.temperatures_c() or line.temperatures_c
        power = self._sensors.power_w() or line.power_w
        sysfs_load = self._sensors.gpu_load()
        load = line.gpu_load if sysfs_load is None else sysfs_load
        throttling = self._throttling()
        missing = {
            "temperatures_c": not temperatures,
            "power_w": not power,
            "gpu_load": load is None,
        }
        unavailable = {name: self._why for name, is_missing in missing.items() if is_missing}
        if throttling is None:
            unavailable["throttled"] = (
                "/sys shows no cooling device that slows, and no event counter"
            )
        if memory.available_bytes is None:
            unavailable["memory_available_bytes"] = "/proc/meminfo does not tell"
        return Machine(
            load_1min=os.getloadavg()[0],
            rss_bytes=memory.rss_bytes,
            memory_available_bytes=memory.available_bytes,
            memory_limit_bytes=memory.limit_bytes,
            temperatures_c=_rounded(temperatures),
            power_w=_rounded(power),
            gpu_load=load,
            throttling=throttling,
            unavailable=unavailable,
        )

    def _open(self) -> bool:
        """Whether /sys leaves one of the readings open that tegrastats may have."""
        s = self._sensors
        return not s.temperatures_c() or not s.power_w() or s.gpu_load() is None


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}
