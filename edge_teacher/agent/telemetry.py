"""How a device is, put together from the kernel, tegrastats where it must be, and the agent itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from edge_teacher import memory
from edge_teacher.agent.sensors import Sensors
from edge_teacher.agent.tegrastats import Line, Tegrastats
from edge_teacher.agent.throttling import ThrottleState, Throttling


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
    throttling: ThrottleState | None
    """None where the machine shows nothing of it."""
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
    ) -> None:
        self._proc = proc
        self._cgroups = sysfs / "fs" / "cgroup"
        self._sensors = Sensors(sysfs)
        self.throttling = Throttling(sysfs)
        """Also for who slows down because of it: it is watched for in one place."""
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
        temperatures = self._sensors.temperatures_c() or line.temperatures_c
        power = self._sensors.power_w() or line.power_w
        sysfs_load = self._sensors.gpu_load()
        load = line.gpu_load if sysfs_load is None else sysfs_load
        throttling = self.throttling.state if self.throttling.shown else None
        available = memory.available_bytes(self._proc)
        missing = {
            "temperatures_c": not temperatures,
            "power_w": not power,
            "gpu_load": load is None,
        }
        unavailable = {name: self._why for name, is_missing in missing.items() if is_missing}
        if throttling is None:
            unavailable["throttled"] = (
                "/sys shows no trip point, no cooling device that slows, and no event counter"
            )
        if available is None:
            unavailable["memory_available_bytes"] = "/proc/meminfo does not tell"
        return Machine(
            load_1min=os.getloadavg()[0],
            rss_bytes=memory.resident_bytes(self._proc),
            memory_available_bytes=available,
            memory_limit_bytes=memory.limit_bytes(self._proc, self._cgroups),
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
