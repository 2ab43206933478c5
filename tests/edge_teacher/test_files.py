from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from edge_teacher import files
from edge_teacher.files import sweep, write_atomically


def test_the_file_is_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


class PowerLossError(BaseException):
    """Not an Exception: no handler on the way may mistake it for an error it can mend."""


@pytest.mark.parametrize("step", ["write", "fsync", "fchmod", "replace"])
def test_an_interruption_at_any_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(*args: object) -> None:
        raise PowerLossError

    if step == "write":

        class Torn:
            def __init__(self, descriptor: int, mode: str) -> None:
                self._file = open(descriptor, mode)  # noqa: SIM115

            def __enter__(self) -> Torn:
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

            def write(self, data: bytes) -> None:
                self._file.write(data[:1])
                raise PowerLossError

        monkeypatch.setattr(files.os, "fdopen", Torn)
    elif step == "replace":
        monkeypatch.setattr(Path, "replace", fails)
    else:
        monkeypatch.setattr(files.os, step, fails)
    with pytest.raises(PowerLossError):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        order.append(f"fsync {kind}")
        sync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(tmp_path / "file", b"x")
    assert order == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize("step", ["fsync", "fchmod"])
def test_a_full_disk_is_said_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left on device") as met:
        write_atomically(tmp_path / "file", b"new")
    assert met.value.errno == errno.ENOSPC
    assert met.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_said_with_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError) as met:
        write_atomically(tmp_path / "taken" / "file", b"new")
    assert met.value.filename == str(tmp_path / "taken" / "file")


def test_what_a_crash_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task" / "highest"
    write_atomically(path, b"3")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:  # killed between the writing and the renaming
            write_atomically(path, b"4")
        os.waitpid(child, 0)
    ours = {path, tmp_path / ".lock", tmp_path / "task" / ".active", tmp_path / "task" / "a.part"}
    for name in ours - {path}:
        name.touch()
    assert len(list(path.parent.iterdir())) == 4
    sweep(tmp_path)
    assert {found for found in tmp_path.rglob("*") if found.is_file()} == ours
    assert path.read_bytes() == b"3"
