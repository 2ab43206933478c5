"""How this machine is, read from /proc and /sys: works on any Linux, asks no vendor's tool."""

from __future__ import annotations

import os
import resource
from pathlib import Path


def rss_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def temperature_c() -> float | None:
    """The hottest thermal zone, or None where the machine shows none."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):
            continue  # a zone may be switched off
    # A sensor without power reads -256 on a Jetson.
    return max((t for t in found if -50 < t < 200), default=None)
