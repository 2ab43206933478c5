"""What people see: results on stdout, as tables or as JSON; on stderr progress bars while they wait.

Where stderr is no terminal, the bars are plain lines.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, NoReturn

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

_LINE_EVERY_S = 30.0
"""Where stderr is no terminal, a stage that takes longer says how far it is."""


class Interruption:
    """Ctrl-C, or SIGTERM: remembered, because an interrupt can be lost.

    Python raises it wherever the main thread happens to be. In a callback of a library, or while a
    module that is being imported tries what there is, it may be swallowed; the next step of progress then
    raises it again.
    """

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> NoReturn:
        self._asked = True
        raise KeyboardInterrupt

    def heed(self) -> None:
        """Raises KeyboardInterrupt, once, if it was asked for and got lost."""
        if self._asked:
            self.clear()
            raise KeyboardInterrupt

    def clear(self) -> None:
        self._asked = False


interruption = Interruption()


def printable(text: str) -> str:
    """What came from a device or a file, without characters that would command the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def teachers_of(number: int) -> str:
    """1 -> "1 teacher"."""
    return f"{number} teacher{'s' * (number != 1)}"


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
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._steps = self._done = self._first = self._images = 0
        self._began = self._said = 0.0

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

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        interruption.heed()
        self.end()
        if not console.is_terminal:
            console.print(f"  {stage} …")
        self._stage, self._steps, self._done, self._first = stage, max(1, steps), done, done
        self._images, self._began = 0, time.monotonic()
        self._said = self._began
        self._task = self._bars.add_task(stage, total=max(1, steps), completed=done, note="")

    def advance(self, loss: float | None = None, images: int = 0) -> None:
        interruption.heed()
        if self._task is None:
            return
        self._done += 1
        self._images += images
        self._bars.advance(self._task)
        if loss is None:
            return
        now = time.monotonic()
        rate = self._images / max(now - self._began, 1e-9)
        self._bars.update(self._task, note=f"loss {loss:.3f}  {rate:,.0f} images/s")
        if not console.is_terminal and now - self._said >= _LINE_EVERY_S:
            self._said = now
            left = (now - self._began) / (self._done - self._first) * (self._steps - self._done)
            console.print(
                f"  {self._stage}: {self._done / self._steps:.0%}, loss {loss:.3f}, "
                f"{rate:,.0f} images/s, {left:,.0f} s left"
            )

    def end(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def say(self, sentence: str) -> None:
        console.print(f"  {sentence}")
