"""Reading the small files of /sys: what is switched off refuses to be read, and what is absent is no error."""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str:
    """Without the white space around it, and the zero byte that device trees end a name with; "" if there is
    none."""
    try:
        return path.read_text(errors="replace").strip().rstrip("\0")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """The first number; None where there is none, for as long as a sensor's part has no power."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def folders(parent: Path, prefix: str = "") -> list[Path]:
    """Those inside `parent` whose name begins so, `zone2` before `zone10`."""
    try:
        found = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))


def millidegrees(zone: Path) -> int | None:
    """The temperature of a thermal zone, in m°C; None for one without power, which refuses, or reads -256 °C on
    a Jetson."""
    found = number(zone / "temp")
    return found if found is not None and -50_000 < found < 200_000 else None
