"""The answers to one question, in a folder of its own.

    question.json   what was asked, of whom, and the shape of one answer
    records.f16     float16 [M, ...]: one answer after the other, read by way of a memory map
    index           M entries of 40 bytes: the image's key, CRC-32 of its record, CRC-32 of the entry
    append          locked (flock) by whoever appends
    in-use          locked, shared, by whoever has the store open; its time is that of the last use

Both files only grow. An entry of the index is written after its record is on disk, so what a crash
leaves is a record without an entry, or a part of an entry: both are cut off by who appends next. An
entry or a record whose checksum is wrong is as if it were not there, and is asked for again.
"""

from __future__ import annotations

import fcntl
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.answers.keys import KEY_BYTES, Keys, Question
from edge_teacher.contract.errors import Malformed
from edge_teacher.files import sync_folder, write_atomically

ABOUT = "question.json"
RECORDS = "records.f16"
INDEX = "index"
APPEND = "append"
IN_USE = "in-use"

_ENTRY = np.dtype([("key", f"V{KEY_BYTES}"), ("record", "<u4"), ("entry", "<u4")])
ENTRY_BYTES = _ENTRY.itemsize
_CHECKED_BYTES = KEY_BYTES + 4


class About(msgspec.Struct, frozen=True, kw_only=True):
    """question.json: what is in a store, for `fedsa cache` and for who opens it.

    Attributes:
        teacher: the device that was asked first; others may have the same bundle.
        shape: of one answer.
    """

    question: Question
    teacher: str
    shape: tuple[int, ...]
    format: int = 1


class AnswerStore:
    """Open until `close`. Any number of threads and processes may have it open and append to it."""

    def __init__(self, folder: Path, question: Question, teacher: str) -> None:
        """Raises OSError if the folder can be neither read nor made."""
        self.folder = folder
        self.damaged = 0
        """Entries and records that were dropped: torn by a crash, or with a wrong checksum."""
        self._question = question
        self._teacher = teacher
        self._in_use = _hold(folder)
        self._lock = threading.RLock()
        self._shape: tuple[int, ...] | None = None
        self._entries = np.empty(0, _ENTRY)
        self._prefixes = np.empty(0, np.uint64)
        self._order = np.empty(0, np.int64)
        self._bad: set[int] = set()
        self._records: NDArray[np.float16] | None = None

    def close(self) -> None:
        with self._lock:
            self._records = None
            # Never again by its number, which may be another file's by then.
            descriptor, self._in_use = self._in_use, -1
            os.close(descriptor)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Where the answers for `keys` [N] are: positions int64[N], -1 for what is not there."""
        with self._lock:
            self._refresh()
            found = np.full(len(keys), -1, np.int64)
            if not len(self._order) or not len(keys):
                return found
            # By the first eight bytes, then compared whole. The last of equals: it is there in the
            # place of a damaged one.
            at = np.searchsorted(self._prefixes, _prefixes(keys), side="right") - 1
            candidates = self._order[np.maximum(at, 0)]
            same = (at >= 0) & (self._entries["key"][candidates] == keys)
            found[same] = candidates[same]
            os.utime(self._in_use)
            return self._without_damaged(found)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float16]:
        """The records float16[N, ...] at `positions` [N], which `find` gave.

        A view of the file where they lie one after the other, as they do for images asked about at
        once; to be read only, and not after `close`.
        """
        with self._lock:
            assert self._records is not None
            if len(positions) and np.array_equal(
                positions, positions[0] + np.arange(len(positions))
            ):
                return self._records[positions[0] : positions[0] + len(positions)]
            return self._records[positions]

    def append(self, keys: Keys, answers: NDArray[np.float16]) -> None:
        """Remember answers [N, ...] for `keys` [N]. On disk when this returns.

        Raises Malformed if they have another shape than those before, OSError on a full disk; what
        was there before is still there then.
        """
        with self._lock, self._appending():
            self._describe(answers.shape[1:])
            missing = self.find(keys) < 0
            keys, answers = keys[missing], np.ascontiguousarray(answers[missing])
            if len(keys):
                self._write(keys, answers)

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def _refresh(self) -> None:
        """Take in what was appended since, by whomever."""
        if self._shape is None:
            about = read_about(self.folder)
            if about is None:
                return
            self._shape = about.shape
        whole = self._whole()
        known = len(self._entries)
        if whole <= known:
            return
        with (self.folder / INDEX).open("rb") as file:
            file.seek(known * _ENTRY.itemsize)
            data = file.read((whole - known) * _ENTRY.itemsize)
        new = np.frombuffer(data, _ENTRY)
        self._entries = np.concatenate([self._entries, new])
        sums = [zlib.crc32(entry) for entry in _head(new)]
        wrong = np.flatnonzero(np.array(sums, np.uint32) != new["entry"]) + known
        self.damaged += len(wrong)
        self._bad.update(wrong.tolist())
        self._map()
        self._sort()

    def _whole(self) -> int:
        """How many entries are whole and have whole records."""
        entries = _size(self.folder / INDEX) // _ENTRY.itemsize
        return min(entries, _size(self.folder / RECORDS) // self._record_bytes)

    @property
    def _record_bytes(self) -> int:
        assert self._shape is not None
        return 2 * int(np.prod(self._shape))

    def _map(self) -> None:
        assert self._shape is not None
        extent = (len(self._entries), *self._shape)
        mapped = np.memmap(self.folder / RECORDS, np.float16, "r", shape=extent)
        # As a plain array: a row of a memmap costs four times as much to take.
        self._records = mapped.view(np.ndarray)

    def _sort(self) -> None:
        good = np.ones(len(self._entries), bool)
        good[list(self._bad)] = False
        rows = np.flatnonzero(good)
        prefixes = _prefixes(self._entries["key"][rows])
        order = np.argsort(prefixes, kind="stable")
        self._prefixes, self._order = prefixes[order], rows[order]

    def _without_damaged(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        there = np.flatnonzero(found >= 0)
        rows = self.rows(found[there])
        sums = np.array([zlib.crc32(row.data) for row in rows], np.uint32)
        wrong = found[there][sums != self._entries["record"][found[there]]]
        if len(wrong):
            self.damaged += len(wrong)
            self._bad.update(wrong.tolist())
            self._sort()
            found[np.isin(found, wrong)] = -1
        return found

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _appending(self) -> Iterator[None]:
        with (self.folder / APPEND).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _describe(self, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            about = read_about(self.folder)
            if about is None:
                about = About(question=self._question, teacher=self._teacher, shape=shape)
                write_atomically(self.folder / ABOUT, msgspec.json.encode(about))
            self._shape = about.shape
        if self._shape != shape:
            raise Malformed(
                f"{self._teacher} answered {self._question.method} with {list(shape)} for an image, "
                f"and with {list(self._shape)} before"
            )

    def _torn(self, whole: int) -> bool:
        """Whether more lies in the files than counts; nobody else is appending now."""
        sizes = (_size(self.folder / INDEX), _size(self.folder / RECORDS))
        return sizes != (whole * _ENTRY.itemsize, whole * self._record_bytes)

    def _write(self, keys: Keys, answers: NDArray[np.float16]) -> None:
        whole = self._whole()
        entries = np.empty(len(keys), _ENTRY)
        entries["key"] = keys
        entries["record"] = [zlib.crc32(answer.data) for answer in answers]
        entries["entry"] = [zlib.crc32(entry) for entry in _head(entries)]
        if self._torn(whole):
            self.damaged += 1
        new = whole == 0
        # First the records, and only when they are on disk the entries that vouch for them.
        _append(self.folder / RECORDS, whole * self._record_bytes, answers.data, 0)
        # An entry that others may have seen stays: they would read its record where none is.
        _append(self.folder / INDEX, whole * _ENTRY.itemsize, entries.data, _ENTRY.itemsize)
        if new:
            sync_folder(self.folder)


def read_about(folder: Path) -> About | None:
    """None where there is none, or one that this version cannot read."""
    try:
        about = msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return about if about.format == 1 and 0 not in about.shape else None


def _hold(folder: Path) -> int:
    """The store's folder, made if need be, and kept from being pruned: a file descriptor."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / IN_USE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # pruned between the two
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _same(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was pruned while we waited


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _append(path: Path, at: int, data: memoryview, keep: int) -> None:
    """Write at `at`, the end of what counts in the file. What does not count is cut off.

    On an error whole pieces of `keep` bytes stay, and with 0 nothing does.
    """
    rest = data.cast("B")
    end = at
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, at)
        try:
            while len(rest):
                written = os.pwrite(descriptor, rest, end)
                end += written
                rest = rest[written:]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end - (end - at) % keep if keep else at)
            raise
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _prefixes(keys: Keys) -> NDArray[np.uint64]:
    rows = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, KEY_BYTES)
    found: NDArray[np.uint64] = np.ascontiguousarray(rows[:, :8]).view(np.uint64)[:, 0]
    return found


def _head(entries: NDArray[np.void]) -> list[bytes]:
    """What of each entry its own checksum is about."""
    size = _ENTRY.itemsize
    data = entries.tobytes()
    return [data[i : i + _CHECKED_BYTES] for i in range(0, len(data), size)]
