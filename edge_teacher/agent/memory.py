"""How much memory this process holds, and how much it may still have."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    rss_bytes: int
    available_bytes: int | None
    """What the kernel could give without swapping; None where it does not say."""
    limit_bytes: int | None
    """The lowest limit among the control group of this process and those around it."""


def read_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """`proc` and `cgroups`: where these are mounted (proc(5), cgroups(7); both versions of the latter)."""
    return Memory(rss_bytes(proc), _available(proc), _limit(proc, cgroups))


def rss_bytes(proc: Path = Path("/proc")) -> int:
    """Resident memory of this process; its peak where `proc` does not tell."""
    try:
        pages = int((proc / "self" / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def _limit(proc: Path, cgroups: Path) -> int | None:
    limits = []
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            limits += _limits_up_from(cgroups, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_up_from(cgroups / "memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits_up_from(root: Path, group: str, name: str) -> list[int]:
    """In a container the group is named as the host sees it: then only what is mounted there counts."""
    found = []
    folder = root / group.lstrip("/")
    for place in (folder, *folder.parents):
        try:
            value = int((place / name).read_text())
        except (OSError, ValueError):  # "max", or no such file at the root
            value = 1 << 62
        if value < 1 << 60:  # version 1 says "no limit" as the largest page-aligned number
            found.append(value)
        if place == root:
            break
    return found
