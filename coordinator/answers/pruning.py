"""What is remembered, by teacher and question, and forgetting some of it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from coordinator.answers.store import ABOUT, APPEND, ENTRY_BYTES, IN_USE, INDEX, RECORDS, read_about
from edge_teacher.contract.errors import UsageError


class StoreSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One store: the answers of one network to one question.

    Attributes:
        path: below the cache's folder.
        teacher: the device that was asked first.
        images: that were asked about; with an attention map that goes along, once for each map.
        last_used_unix_s: when it was last read or written.
        in_use: a command has it open now.
    """

    path: str
    teacher: str
    bundle: str
    method: str
    query: str
    encoding: str
    image_size: tuple[int, int]
    images: int
    bytes: int
    last_used_unix_s: float
    in_use: bool


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """`unreadable`: folders that lie where stores do and are none of this version."""

    stores: tuple[StoreSummary, ...]
    unreadable: tuple[str, ...] = ()


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """`kept`: what should have gone, and is in use."""

    removed: tuple[StoreSummary, ...]
    kept: tuple[StoreSummary, ...]


def survey(cache: Path) -> Survey:
    """Everything in `cache`, by teacher and question. Raises UsageError if it is no folder."""
    if not cache.is_dir():
        raise UsageError(f"{cache} is no folder: name that of the answers with --answers")
    found, unreadable = [], []
    for in_use in sorted(cache.glob(f"*/*/{IN_USE}")):
        folder = in_use.parent
        with suppress(FileNotFoundError):  # pruned by another command just now
            if not (folder / ABOUT).exists():
                continue  # begun, and nothing answered yet
            summary = _summary(cache, folder)
            if summary is None:
                unreadable.append(str(folder.relative_to(cache)))
            else:
                found.append(summary)
    found.sort(key=lambda s: (s.teacher, s.bundle, s.method, s.query, s.encoding))
    return Survey(stores=tuple(found), unreadable=tuple(unreadable))


def prune(
    cache: Path,
    *,
    unused_days: float | None = None,
    keep_bytes: int | None = None,
    teachers: Sequence[str] = (),
) -> Pruned:
    """Remove stores: of the `teachers` (a device's name or a bundle's digest), else of all,
    those unused for so many days, and then the least recently used until at most `keep_bytes` are
    left. With neither, all of the `teachers`.

    What another process has open stays. Raises UsageError if nothing was said to go, or a teacher is
    not known.
    """
    if unused_days is None and keep_bytes is None and not teachers:
        raise UsageError(
            "say what is to go: --unused-days, --keep-bytes or --teacher (--keep-bytes 0 is all)"
        )
    stores = survey(cache).stores
    for name in teachers:
        if not any(name in (s.teacher, s.bundle) for s in stores):
            known = ", ".join(sorted({s.teacher for s in stores})) or "nobody"
            raise UsageError(f"nothing is remembered of {name!r}, only of {known}")
    scope = [s for s in stores if not teachers or {s.teacher, s.bundle} & set(teachers)]
    scope.sort(key=lambda s: s.last_used_unix_s)
    every = unused_days is None and keep_bytes is None
    before = time.time() - 86400 * (unused_days or 0)
    left = sum(s.bytes for s in scope)
    removed, kept = [], []
    for store in scope:
        old = unused_days is not None and store.last_used_unix_s <= before
        much = keep_bytes is not None and left > keep_bytes
        if not (every or old or much):
            continue
        if _remove(cache / store.path):
            removed.append(store)
            left -= store.bytes
        else:
            kept.append(store)
    return Pruned(removed=tuple(removed), kept=tuple(kept))


def _summary(cache: Path, folder: Path) -> StoreSummary | None:
    about = read_about(folder)
    if about is None:
        return None
    question = about.question
    sizes = {name: _size(folder / name) for name in (RECORDS, INDEX, ABOUT)}
    return StoreSummary(
        path=str(folder.relative_to(cache)),
        teacher=about.teacher,
        bundle=question.bundle,
        method=question.method,
        query=question.query,
        encoding=question.encoding,
        image_size=question.image_size,
        images=sizes[INDEX] // ENTRY_BYTES,
        bytes=sum(sizes.values()),
        last_used_unix_s=(folder / IN_USE).stat().st_mtime,
        in_use=_in_use(folder / IN_USE),
    )


def _in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not _alone(descriptor)
    finally:
        os.close(descriptor)


def _alone(descriptor: int) -> bool:
    """Take the lock that everybody shares who has the store open; False if somebody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> bool:
    """False if it is in use. Who comes meanwhile waits, sees that it is gone, and begins anew."""
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDONLY)
    except FileNotFoundError:
        return True  # another command was faster
    try:
        if not _alone(descriptor):
            return False
        # The lock's file last: as long as it is there, nobody else touches the others.
        for name in (INDEX, RECORDS, ABOUT, APPEND, IN_USE):
            (folder / name).unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            with suppress(OSError):  # somebody has begun anew in it, or it holds other stores
                empty.rmdir()
        return True
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
