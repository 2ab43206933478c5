"""Log lines for people, or one JSON object per line; with priorities where the journal reads them."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Literal, TextIO

import msgspec

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

# sd-daemon(3): a line that begins with <N> has that priority, and the journal takes the mark off.
_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

_LONGEST = 16 * 1024
"""Of a message. What others send is quoted in some, and a journal's line is cut at 48 kB."""


class _Line(msgspec.Struct, omit_defaults=True):
    time: str
    """UTC, as this machine's clock has it."""
    up_s: float
    """Since the agent's start, whatever the clock does meanwhile."""
    level: str
    message: str
    logger: str
    thread: str
    exception: str = ""


class JsonFormatter(logging.Formatter):
    """One object per line: see `_Line`, and `fields` besides, which are the same in every line."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = dict(fields)
        self._began = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line = _Line(
            time=at.isoformat(timespec="milliseconds"),
            up_s=round(time.monotonic() - self._began, 3),
            level=record.levelname.lower(),
            message=_bounded(record.getMessage()),
            logger=record.name,
            thread=record.threadName or "",
            exception=_bounded(self.formatException(record.exc_info)) if record.exc_info else "",
        )
        return msgspec.json.encode({**msgspec.to_builtins(line), **self._fields}).decode()


class TextFormatter(logging.Formatter):
    """A line for people. The journal keeps the time itself."""

    def __init__(self, *, timed: bool) -> None:
        super().__init__(("%(asctime)s " if timed else "") + "%(levelname)s %(message)s")


class _Marked(logging.Formatter):
    """Each line with its priority in front, as the journal wants it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{_PRIORITY.get(record.levelname, 6)}>"
        return "\n".join(mark + line for line in self._inner.format(record).splitlines())


@contextmanager
def logging_to(
    form: LogFormat,
    level: LogLevel,
    *,
    fields: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> Iterator[None]:
    """Meanwhile this process's log goes to `stream` (standard error).

    Nothing is written to disk: keeping lines, and how many, is the journal's task.
    """
    stream = stream or sys.stderr
    journal = _is_journal(stream)
    inner = JsonFormatter(fields or {}) if form == "json" else TextFormatter(timed=not journal)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Marked(inner) if journal else inner)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    set_level(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def set_level(level: LogLevel) -> None:
    logging.getLogger().setLevel(level.upper())


def _is_journal(stream: TextIO) -> bool:
    """Whether $JOURNAL_STREAM, device:inode, names this very stream (systemd.exec(5))."""
    said = os.environ.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return said == f"{found.st_dev}:{found.st_ino}"


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
