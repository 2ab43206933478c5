"""What people see: results on stdout, as tables or as JSON; on stderr progress bars while they wait.

Where stderr is no terminal, the bars are plain lines.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# No markup: what devices and files are called comes from elsewhere and may look like it.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
stdout = Console(highlight=False, markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """What came from a device or a file, without characters that would command the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def plain(struct: Any) -> Any:
    """A struct as what JSON knows."""
    return msgspec.to_builtins(struct)


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


class TerminalProgress:
    """A `coordinator.progress.Progress` drawn with rich."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("  {task.description:<14}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>4.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _t: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, stage: str, steps: int) -> None:
        self.end()
        if not console.is_terminal:
            console.print(f"  {stage} …")
        self._task = self._bars.add_task(stage, total=max(1, steps), loss="")

    def advance(self, loss: float | None = None) -> None:
        if self._task is not None:
            self._bars.advance(self._task)
            if loss is not None:
                self._bars.update(self._task, loss=f"loss {loss:.3f}")

    def end(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def say(self, sentence: str) -> None:
        console.print(f"  {sentence}")
