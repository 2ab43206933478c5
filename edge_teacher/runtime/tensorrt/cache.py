"""Engines and timings that outlive the process. What cannot be trusted to the byte is built again.

A file is one header and one content, written together and at once: an engine is never found beside a
description of another. Layout: 16 bytes of magic, the header's size (4 bytes, little-endian), the header as
JSON, the content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from edge_teacher.files import sync_folder, write_atomically
from edge_teacher.runtime.tensorrt.key import EngineKey, Hardware, digest_of

MAX_BYTES = 2 << 30
_MAGIC = b"fedsa engine 1\n\0"
_STALE_S = 24 * 3600.0
"""An unfinished file older than this was left by a writer that died."""

Key = TypeVar("Key", EngineKey, Hardware)


class _Header(msgspec.Struct, Generic[Key], frozen=True):
    """Written before the content."""

    key: Key
    sha256: str
    """Of the content."""
    bytes: int


class EngineCache:
    """Files in one folder, together at most `max_bytes`: the least recently used go.

    Safe among threads and processes: what two write at once, one of them has written, whole.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def engine(self, key: EngineKey) -> tuple[bytes | None, str]:
        """(the engine, or None; why a file that is there is not used, or nothing)."""
        return _read(self._file(key), key, _Header[EngineKey])

    def keep(self, key: EngineKey, engine: bytes) -> str:
        """Remember an engine. Returns why it could not be, or nothing: it can still be used."""
        return self._write(self._file(key), key, engine)

    def timing(self, hardware: Hardware) -> bytes:
        """What was measured on this hardware; empty where nothing is known."""
        found, _ = _read(self._file(hardware), hardware, _Header[Hardware])
        return found or b""

    def keep_timing(self, hardware: Hardware, timing: bytes) -> str:
        return self._write(self._file(hardware), hardware, timing)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _file(self, key: EngineKey | Hardware) -> Path:
        kind = "engine" if isinstance(key, EngineKey) else "timing"
        return self.folder / f"{digest_of(key)[:32]}.{kind}"

    def _write(self, path: Path, key: EngineKey | Hardware, content: bytes) -> str:
        header = msgspec.json.encode(
            _Header(key, hashlib.sha256(content).hexdigest(), len(content))
        )
        data = b"".join([_MAGIC, len(header).to_bytes(4, "little"), header, content])
        if len(data) > self._max_bytes:
            return (
                f"{len(data)} bytes are more than the {self._max_bytes} that {self.folder} may hold: "
                "it is built again at the next start"
            )
        try:
            self._make_room(len(data), path)
            write_atomically(path, data)
        except OSError as error:
            return (
                f"{self.folder} cannot keep it ({error.strerror or error}): it is built again at the "
                "next start"
            )
        return ""

    def _make_room(self, size: int, for_file: Path) -> None:
        if not self.folder.is_dir():
            return
        files = []
        for path in self.folder.iterdir():
            try:
                state = path.stat()
            except FileNotFoundError:
                continue  # another process made room too
            if path.name.startswith("."):
                if time.time() - state.st_mtime > _STALE_S:
                    path.unlink(missing_ok=True)
            elif path != for_file and path.suffix in (".engine", ".timing"):
                files.append((state.st_mtime, path, state.st_size))
        held = sum(size for *_, size in files)
        for _, path, freed in sorted(files):
            if held + size <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            held -= freed
        sync_folder(self.folder)


def _read(path: Path, key: Key, header: type[_Header[Key]]) -> tuple[bytes | None, str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    content, why_not = _content(data, key, header)
    if content is None:
        return None, f"{path} is no file of this cache that can be trusted: {why_not}"
    # Used just now: others go first. A folder that cannot be written to forgets nothing either.
    with contextlib.suppress(OSError):
        os.utime(path)
    return content, ""


def _content(data: bytes, key: Key, header: type[_Header[Key]]) -> tuple[bytes | None, str]:
    if not data.startswith(_MAGIC):
        return None, "it does not begin as one"
    start = len(_MAGIC) + 4
    end = start + int.from_bytes(data[start - 4 : start], "little")
    content = data[end:]
    try:
        said = msgspec.json.decode(data[start:end], type=header)
    except (ValueError, RecursionError) as error:
        return None, f"its header cannot be read ({error})"
    if len(content) != said.bytes or hashlib.sha256(content).hexdigest() != said.sha256:
        return None, "its checksum is wrong"
    if said.key != key:
        return None, "it was made for something else"
    return content, ""
