"""How much memory this process holds, and how much it may have: what /proc and the control groups say."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def resident_bytes(proc: Path = PROC) -> int:
    """Of this process; 0 where `proc` does not tell.

    getrusage is no help there: its maximum is that of the process this one was forked from, if that had more.
    """
    try:
        pages = int((proc / "self" / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(proc: Path = PROC) -> int | None:
    """What the kernel could give without swapping; None where it does not say."""
    return _meminfo(proc, "MemAvailable")


def total_bytes(proc: Path = PROC) -> int | None:
    """Of the machine; None where it does not say."""
    return _meminfo(proc, "MemTotal")


def limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """The lowest limit among the control group of this process and those around it; None without one.

    Both versions of cgroups(7) are understood; of version 2 `memory.high` too, above which the kernel lets
    a process crawl.
    """
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            for root in (cgroups, cgroups / "unified"):  # where both versions are, 2 is below
                found += _limits_up_from(root, path, ("memory.max", "memory.high"))
        elif "memory" in controllers.split(","):
            found += _limits_up_from(cgroups / "memory", path, ("memory.limit_in_bytes",))
    return min(found, default=None)


def _limits_up_from(root: Path, group: str, names: tuple[str, ...]) -> list[int]:
    """In a container the group is named as the host sees it: then only what is mounted there counts."""
    found = []
    folder = root / group.lstrip("/")
    for place in (folder, *folder.parents):
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # "max", or no such file at the root
                limit = int((place / name).read_text())
                if limit < 1 << 60:  # version 1 says "no limit" as the largest number of pages
                    found.append(limit)
        if place == root:
            break
    return found


def _meminfo(proc: Path, field: str) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
