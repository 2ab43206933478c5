"""What the command line says of several tasks, and whether enough is said to train at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.config import Config
from edge_teacher.contract.errors import UsageError


def task_flags(
    rest: Sequence[str], error: Callable[[str], object]
) -> tuple[dict[str, str], list[str]]:
    """({"tasks.NAME.key": text}, what is left) of arguments that no parser knew.

    `error` is called, as argparse's own, where a flag has no value.
    """
    found: dict[str, str] = {}
    left: list[str] = []
    waiting = list(rest)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--tasks."):
            left.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        if not equals and (not waiting or waiting[0].startswith("--")):
            error(f"argument --{key}: expected one argument")
        found[key] = text if equals else waiting.pop(0)
    return found, left


def require_settings(config: Config) -> None:
    """What has no default must be named. Raises UsageError."""
    wanted = [("broker.url", config.broker.url, "broker")]
    if config.tasks:
        wanted += [
            (f"tasks.{name}.probe", task.probe, f"tasks.{name}.probe")
            for name, task in config.tasks.items()
        ]
        every = config.data.transfer or next(
            (t.transfer for t in config.tasks.values() if t.transfer), ""
        )
        wanted += [("data.transfer", every, "data.transfer")]
    else:
        wanted += [
            (f"data.{key}", getattr(config.data, key), f"data.{key}")
            for key in ("probe", "transfer")
        ]
    for key, value, flag in wanted:
        if not value:
            raise UsageError(
                f"{key} is not set: name it with --{flag}, or in the file given with --config"
            )
