from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from coordinator.answers import AnswerStore, Question, image_keys
from coordinator.answers import store as store_module
from edge_teacher.contract.errors import Malformed
from tests.edge_teacher.nets import pictures

QUESTION = Question(bundle="ab" * 32, method="saliency", query="{}", image_size=(8, 8))
IMAGES = pictures(20)
KEYS = image_keys(IMAGES)
ANSWERS = np.random.default_rng(0).random((20, 2, 3)).astype(np.float16)


def opened(folder: Path) -> AnswerStore:
    return AnswerStore(folder, QUESTION, "d1")


def held(store: AnswerStore, keys: np.ndarray = KEYS) -> dict[int, np.ndarray]:
    """The answers that the store has, by the position of the key."""
    positions = store.find(keys)
    there = np.flatnonzero(positions >= 0)
    if not len(there):
        return {}
    return dict(zip(there.tolist(), store.rows(positions[there]), strict=True))


def is_right(found: dict[int, np.ndarray]) -> bool:
    return all(np.array_equal(answer, ANSWERS[i]) for i, answer in found.items())


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Two appends of ten answers each."""
    store = opened(tmp_path)
    store.append(KEYS[:10], ANSWERS[:10])
    store.append(KEYS[10:], ANSWERS[10:])
    store.close()
    return tmp_path


def test_what_was_appended_is_found_in_any_order(filled: Path) -> None:
    store = opened(filled)
    order = np.random.default_rng(1).permutation(20)
    positions = store.find(KEYS[order])
    assert np.array_equal(store.rows(positions), ANSWERS[order])
    assert (store.find(image_keys(pictures(3, seed=9))) == -1).all()
    assert store.find(KEYS[:0]).shape == (0,)


def test_answers_of_images_asked_at_once_are_not_copied(filled: Path) -> None:
    store = opened(filled)
    rows = store.rows(store.find(KEYS[3:17]))
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    base = rows
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


def test_an_answer_is_remembered_once(filled: Path) -> None:
    before = (filled / "records.f16").stat().st_size
    store = opened(filled)
    store.append(KEYS, ANSWERS)
    assert (filled / "records.f16").stat().st_size == before == 20 * 6 * 2
    assert (filled / "index").stat().st_size == 20 * 40


def test_the_same_pixels_in_another_shape_are_another_image() -> None:
    wide = IMAGES.reshape(20, 4, 16, 3)
    assert not (image_keys(IMAGES) == image_keys(wide)).any()
    attention = np.ones((20, 2, 2), np.float16)
    assert not (image_keys(IMAGES) == image_keys(IMAGES, attention)).any()
    attention[4] = 0.5
    same = image_keys(IMAGES, attention) == image_keys(IMAGES, np.ones((20, 2, 2), np.float16))
    assert np.flatnonzero(~same).tolist() == [4]


@pytest.mark.parametrize("name", ["index", "records.f16"])
def test_after_any_tear_what_is_whole_is_right_and_the_rest_is_asked_again(
    filled: Path, name: str
) -> None:
    whole = {n: (filled / n).read_bytes() for n in ("index", "records.f16")}
    each = len(whole[name]) // 20
    for end in range(0, len(whole[name]), 7):
        for other, data in whole.items():
            (filled / other).write_bytes(data)
        (filled / name).write_bytes(whole[name][:end])
        store = opened(filled)
        found = held(store)
        assert len(found) == end // each
        assert is_right(found)
        store.append(KEYS, ANSWERS)
        assert store.damaged == 1
        again = held(store)
        assert len(again) == 20
        assert is_right(again)
        store.close()
        assert {n: (filled / n).read_bytes() for n in whole} == whole


@pytest.mark.parametrize("name", ["index", "records.f16"])
def test_any_wrong_byte_costs_one_answer_which_is_then_replaced(filled: Path, name: str) -> None:
    whole = (filled / name).read_bytes()
    each = len(whole) // 20
    for at in range(0, len(whole), 11):
        wrong = bytearray(whole)
        wrong[at] ^= 0x10
        (filled / name).write_bytes(wrong)
        store = opened(filled)
        found = held(store)
        assert sorted(set(range(20)) - found.keys()) == [at // each]
        assert is_right(found)
        assert store.damaged == 1
        store.close()
    store = opened(filled)
    store.append(KEYS, ANSWERS)
    assert len(held(store)) == 20
    store.close()
    again = opened(filled)
    assert len(held(again)) == 20
    assert is_right(held(again))


def test_a_crash_between_the_records_and_the_index_loses_that_append_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.append(KEYS[:10], ANSWERS[:10])
    written = store_module._append

    def crash(path: Path, at: int, data: memoryview, keep: int) -> None:
        if path.name == "index":
            raise KeyboardInterrupt
        written(path, at, data, keep)

    monkeypatch.setattr(store_module, "_append", crash)
    with pytest.raises(KeyboardInterrupt):
        store.append(KEYS[10:], ANSWERS[10:])
    monkeypatch.undo()
    store.close()
    again = opened(tmp_path)
    assert sorted(held(again)) == list(range(10))
    again.append(KEYS[15:], ANSWERS[15:])
    assert sorted(held(again)) == [*range(10), *range(15, 20)]
    assert is_right(held(again))


def test_the_index_is_synced_after_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        really(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        index = tmp_path / "index"
        synced.append((path.name, index.stat().st_size if index.exists() else 0))

    store = opened(tmp_path)
    store.append(KEYS[:5], ANSWERS[:5])
    monkeypatch.setattr(os, "fsync", fsync)
    store.append(KEYS[5:], ANSWERS[5:])
    assert synced == [("records.f16", 5 * 40), ("index", 20 * 40)]


def test_a_full_disk_leaves_what_was_there(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = pictures(30, seed=4)
    really = os.pwrite

    def pwrite(descriptor: int, data: memoryview, at: int) -> int:
        if len(data) > 100:
            return really(descriptor, data[: len(data) // 2], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = opened(filled)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        store.append(image_keys(more), np.ones((30, 2, 3), np.float16))
    assert (filled / "records.f16").stat().st_size == 20 * 12
    assert len(held(store)) == 20
    monkeypatch.undo()
    store.append(image_keys(more), np.ones((30, 2, 3), np.float16))
    assert store.damaged == 0
    assert len(held(store, image_keys(more))) == 30


def test_a_disk_that_is_full_in_the_middle_of_the_index_keeps_its_whole_entries(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = image_keys(pictures(5, seed=4))
    answers = np.arange(30, dtype=np.float16).reshape(5, 2, 3)
    really = os.pwrite

    def pwrite(descriptor: int, data: memoryview, at: int) -> int:
        if at == 20 * 40 and len(data) == 5 * 40:
            return really(descriptor, data[:100], at)
        if at == 20 * 40 + 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(descriptor, data, at)

    store, other = opened(filled), opened(filled)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        store.append(more, answers)
    monkeypatch.undo()
    assert (filled / "index").stat().st_size == 22 * 40
    seen = held(other, more)
    assert sorted(seen) == [0, 1]
    store.append(more, answers)
    assert all(np.array_equal(found, answers[i]) for i, found in held(other, more).items())
    assert len(held(other, more)) == 5


def test_an_answer_of_another_shape_is_refused(filled: Path) -> None:
    with pytest.raises(Malformed, match=r"d1 answered saliency with \[3, 3\].* \[2, 3\] before"):
        opened(filled).append(image_keys(pictures(1, seed=8)), np.ones((1, 3, 3), np.float16))


def _appends(folder: Path, number: int, start: threading.Barrier) -> None:
    store = opened(folder)
    start.wait(30)
    images = pictures(60, seed=number % 2)  # two of the four remember the same
    for i in range(0, 60, 3):
        keys = image_keys(images[i : i + 3])
        store.append(keys, np.full((3, 2, 3), i, np.float16))
        assert (store.find(keys) >= 0).all()
    store.close()


def test_several_processes_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    children = [context.Process(target=_appends, args=(tmp_path, n, start)) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "index").stat().st_size == 120 * 40
    store = opened(tmp_path)
    for seed in (0, 1):
        found = held(store, image_keys(pictures(60, seed=seed)))
        assert len(found) == 60
        assert all((answer == i - i % 3).all() for i, answer in found.items())
    assert store.damaged == 0


def test_what_another_process_appends_is_seen(filled: Path) -> None:
    reader, writer = opened(filled), opened(filled)
    more = pictures(4, seed=7)
    rows = reader.rows(reader.find(KEYS))
    writer.append(image_keys(more), np.ones((4, 2, 3), np.float16))
    assert len(held(reader, image_keys(more))) == 4
    assert np.array_equal(rows, ANSWERS)  # and what was handed out stays what it was


def test_ten_thousand_images_are_looked_up_in_moments(tmp_path: Path) -> None:
    """Not image by image: a loop over a file each took 20 s."""
    import time

    rng = np.random.default_rng(0)
    keys = np.frombuffer(rng.bytes(32 * 10_000), "V32")
    store = opened(tmp_path)
    store.append(keys, rng.random((10_000, 96)).astype(np.float16))
    store.close()
    again = opened(tmp_path)
    began = time.perf_counter()
    positions = again.find(keys)
    spent = time.perf_counter() - began
    assert (positions >= 0).all()
    assert spent < 2
