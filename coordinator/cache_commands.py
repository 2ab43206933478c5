"""`fedsa cache`: what is remembered of teachers' answers, and forgetting some of it."""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table

from coordinator.answers.pruning import StoreSummary, prune, survey
from coordinator.export_commands import AddCommand
from coordinator.terminal import console as stderr
from coordinator.terminal import plain, print_json, printable, stdout

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_cache(commands: Subparsers, command: AddCommand) -> None:
    cache = commands.add_parser("cache", help="answers of teachers that are remembered")
    kinds = cache.add_subparsers(dest="kind", required=True, metavar="KIND")
    show = command("show", _show, "what is remembered, by teacher and question", under=kinds)
    forget = command("prune", _prune, "forget some of it", under=kinds)
    forget.add_argument(
        "--unused-days", type=_days, help="what was not used for so many days (1.5, or 0 for all)"
    )
    forget.add_argument(
        "--keep-bytes",
        type=_bytes,
        help="the least recently used, until at most so much is left (500M, 2G; 0 for nothing)",
    )
    forget.add_argument(
        "--teacher",
        action="append",
        default=[],
        help="only of this device or bundle digest; alone: all of it (repeatable)",
    )
    for each in (show, forget):
        each.add_argument(
            "--answers",
            type=Path,
            default=Path("runs/answers"),
            help="folder of the answers (default: runs/answers; a demo's is RUN/answers)",
        )


def _show(options: argparse.Namespace) -> int:
    found = survey(options.answers)
    for folder in found.unreadable:
        stderr.print(
            f"fedsa: {options.answers / folder} is no store of answers that this version can read; "
            "delete it if nothing needs it",
            soft_wrap=True,
        )
    if options.json:
        print_json(plain(found))
    else:
        stdout.print(_table(found.stores) if found.stores else "No answers are remembered.")
        stdout.print(f"{sum(s.bytes for s in found.stores):,} bytes in {options.answers}")
    return 1 if found.unreadable else 0


def _prune(options: argparse.Namespace) -> int:
    done = prune(
        options.answers,
        unused_days=options.unused_days,
        keep_bytes=options.keep_bytes,
        teachers=options.teacher,
    )
    if options.json:
        print_json(plain(done))
    else:
        if done.removed:
            stdout.print(_table(done.removed))
        gone = sum(s.bytes for s in done.removed)
        stores = "store" if len(done.removed) == 1 else "stores"
        stdout.print(f"Removed {len(done.removed)} {stores}, {gone:,} bytes")
    for store in done.kept:
        stderr.print(
            printable(
                f"fedsa: {options.answers / store.path} ({store.teacher}, {store.method}) is in use "
                "and was left alone; prune again when that run is over"
            ),
            soft_wrap=True,
        )
    return 1 if done.kept else 0


def _table(stores: tuple[StoreSummary, ...]) -> Table:
    table = Table("teacher", "bundle", "question", "images of", "images", "bytes", "last used")
    for store in stores:
        cells = (
            store.teacher,
            store.bundle[:8],
            _question(store),
            "{} × {}".format(*store.image_size),
            f"{store.images:,}",
            f"{store.bytes:,}",
            "now" if store.in_use else _ago(time.time() - store.last_used_unix_s),
        )
        table.add_row(*map(printable, cells))
    return table


def _question(store: StoreSummary) -> str:
    details = msgspec.json.decode(store.query)
    # form: pooled, mirrored: true, tap: mid -> "pooled, mirrored, tap mid"
    words = [
        name if value is True else str(value) if name == "form" else f"{name} {value}"
        for name, value in details.items()
    ]
    if store.encoding != "f16":
        words.append(store.encoding)
    return store.method + (f" ({', '.join(words)})" if words else "")


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit} ago"
    return "just now"


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days <= 36500:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days: take 0 or more")
    return days


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15})([kMGT]?)B?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write 500M, 2G or a number of bytes"
        )
    return int(found.group(1)) * _UNITS[found.group(2)]
