"""Writing so that a reader, or a machine that lost power, never meets half a file."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_teacher.contract.errors import UsageError

_LEFT_OVER = re.compile(r"\..+\.[a-z0-9_]{8}")
"""What tempfile makes of the prefix that `write_atomically` gives it."""


@contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """Nobody else works in `folder`, which is made if it is missing, meanwhile.

    Raises UsageError if somebody does (`who`, as people say), or if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"{folder} cannot be used: {error.strerror}; name another") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another {who} is at work in {folder}; wait for it, or name another"
            ) from error
        yield


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Temporary name in the same folder, fsync, rename, fsync of the folder.

    Raises OSError, whose `filename` is `path`, if the disk is full or the folder not to be written to.
    """
    try:
        _write(path, data, mode)
    except OSError as error:
        # Of a full disk the system does not say which file met it, or names the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what `write_atomically` left anywhere below `folder` when it was cut off.

    Only whoever works there alone may do so (see `locked`).
    """
    for left in folder.rglob(".*.????????"):
        if _LEFT_OVER.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
