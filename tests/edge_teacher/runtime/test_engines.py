"""Engines that are remembered: never one that was made for something else, never half of one."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cuda import Gpu
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.tensorrt import cache as module
from edge_teacher.runtime.tensorrt.cache import EngineCache
from edge_teacher.runtime.tensorrt.key import (
    EngineKey,
    Hardware,
    Options,
    Profile,
    hardware_of,
    key_of,
    profile_for,
)
from edge_teacher.runtime.tensorrt.maker import EngineMaker, Made
from export.checks.tensorrt import installed_tensorrt
from tests.edge_teacher.nets import student_graph, teacher_graph
from tests.edge_teacher.runtime.fake_gpu import FakeTensorRT

GPU = Gpu(name="Orin", architecture="8.7", memory_bytes=1 << 30, integrated=True, cuda="12.6")
OUTPUTS = ("saliency", "features.last")
HARDWARE = Hardware(tensorrt="tensorrt 10.3.0", gpu="Orin", architecture="8.7")
KEY = key_of(
    HARDWARE,
    teacher_graph(),
    OUTPUTS,
    precision="fp32",
    profile=profile_for((8, 8)),
    options=Options(),
)


def make(
    folder: Path | None, trt: ModuleType | None = None, gpu: Gpu = GPU, **changes: Any
) -> tuple[Made, ModuleType]:
    """An engine by a maker that has just been started, of the tiny teacher where nothing else is said."""
    trt = trt or FakeTensorRT()
    cache = None if folder is None else EngineCache(folder)
    maker = EngineMaker(trt, gpu, cache, options=changes.pop("options", Options()))
    arguments: dict[str, Any] = {"precision": "fp32", "profile": profile_for((8, 8)), **changes}
    graph, outputs = (
        arguments.pop(k, d) for k, d in (("graph", teacher_graph()), ("outputs", OUTPUTS))
    )
    return maker.make(graph, outputs, **arguments), trt


def files(folder: Path, kind: str = "engine") -> list[Path]:
    return sorted(folder.glob(f"*.{kind}"))


def test_an_engine_is_built_once_and_then_found(tmp_path: Path) -> None:
    first, trt = make(tmp_path)
    again, other = make(tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert (len(trt.built), len(other.built)) == (1, 0)
    assert again.engine == first.engine
    assert again.key == first.key == KEY


CHANGES: dict[str, dict[str, Any]] = {
    "the ONNX file": {"graph": teacher_graph() + b"\x32\x01x"},  # a doc string more
    "the TensorRT version": {"trt": FakeTensorRT("10.13.3")},
    "the GPU's name": {"gpu": msgspec.structs.replace(GPU, name="Orin Nano")},
    "the GPU's architecture": {"gpu": msgspec.structs.replace(GPU, architecture="11.0")},
    "the precision": {"precision": "fp16"},
    "the profile": {"profile": profile_for((8, 8), largest_batch=8)},
    "the outputs": {"outputs": ("features.last",)},
    "the optimisation level": {"options": Options(level=5)},
    "the workspace": {"options": Options(workspace_bytes=1 << 20)},
    "tf32": {"options": Options(tf32=False)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_any_field_builds_again(tmp_path: Path, change: str) -> None:
    make(tmp_path)
    made, trt = make(tmp_path, **CHANGES[change])
    assert not made.cached
    assert trt.built
    assert len(files(tmp_path)) == 2
    assert make(tmp_path)[0].cached  # and the first one is still there


def test_every_field_of_the_key_is_in_its_digest() -> None:
    """Also of one that somebody adds: its digest must change with it."""
    others: dict[type, Any] = {str: "other", int: 99, bool: False}

    def changed(struct: msgspec.Struct) -> list[msgspec.Struct]:
        found = []
        for field in msgspec.structs.fields(struct):
            value = getattr(struct, field.name)
            if isinstance(value, msgspec.Struct):
                new = changed(value)
            elif isinstance(value, tuple):
                new = [(*value[:-1], "x" if isinstance(value[-1], str) else 1000)]
            else:
                new = [others[type(value)]]
            found += [msgspec.structs.replace(struct, **{field.name: each}) for each in new]
        return found

    variants = changed(KEY)
    assert len(variants) >= 13
    assert len({each.digest for each in (*variants, KEY)}) == len(variants) + 1  # type: ignore[attr-defined]


def test_the_order_of_outputs_makes_no_other_engine() -> None:
    other = key_of(
        HARDWARE,
        teacher_graph(),
        OUTPUTS[::-1],
        precision="fp32",
        profile=profile_for((8, 8)),
        options=Options(),
    )
    assert other.digest == KEY.digest


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = {
        "empty": b"",
        "cut off": data[: len(data) // 2],
        "one bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "longer": data + b"x",
        "no header": data[:20] + b"\0" * 40 + data[60:],
        "something else": b"\x7fELF" + data,
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize(
    "how", ["empty", "cut off", "one bit", "longer", "no header", "something else"]
)
def test_a_damaged_entry_is_built_again_and_said(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = make(tmp_path)
    (path,) = files(tmp_path)
    damaged(path, how)
    again, trt = make(tmp_path)
    assert not again.cached
    assert trt.built
    assert "no file of this cache that can be trusted" in again.notes[0]
    assert "the engine is built again" in caplog.text
    assert again.engine == first.engine
    assert make(tmp_path)[0].cached


def test_an_entry_of_another_key_under_this_name_is_foreign(tmp_path: Path) -> None:
    make(tmp_path)
    (mine,) = files(tmp_path)
    make(tmp_path, precision="fp16")
    (other,) = set(files(tmp_path)) - {mine}
    other.replace(mine)
    made, _ = make(tmp_path)
    assert not made.cached
    assert "it was made for something else" in made.notes[0]


def test_an_engine_that_tensorrt_will_not_load_is_built_again(tmp_path: Path) -> None:
    made, trt = make(tmp_path)
    maker = EngineMaker(trt, GPU, EngineCache(tmp_path))
    again = maker.rebuild(made, teacher_graph(), None, "mine")
    assert (again.cached, len(trt.built)) == (False, 2)
    assert "cannot be loaded" in again.notes[0]


def test_timings_are_kept_for_the_hardware_and_given_to_the_next_build(tmp_path: Path) -> None:
    make(tmp_path)
    cache = EngineCache(tmp_path)
    assert cache.timing(HARDWARE) == b"measured"
    other = msgspec.structs.replace(HARDWARE, architecture="11.0")
    assert cache.timing(other) == b""
    (path,) = files(tmp_path, "timing")
    damaged(path, "one bit")
    assert cache.timing(HARDWARE) == b""


class TestBounds:
    def keys(self, count: int) -> list[EngineKey]:
        return [msgspec.structs.replace(KEY, precision=f"p{i}") for i in range(count)]

    def test_the_least_recently_used_goes(self, tmp_path: Path) -> None:
        cache = EngineCache(tmp_path, max_bytes=5000)
        one, two, three = self.keys(3)
        for day, key in ((1, one), (2, two)):
            assert cache.keep(key, bytes(1500)) == ""
            os.utime(cache._file(key), (86400 * day, 86400 * day))
        assert cache.engine(one)[0] is not None  # used: now the newer of the two
        assert cache.keep(three, bytes(1500)) == ""
        assert cache.engine(two) == (None, "")
        assert cache.engine(one)[0] is not None
        assert cache.engine(three)[0] is not None
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000

    def test_one_that_is_larger_than_the_bound_is_not_kept_and_nothing_goes_for_it(
        self, tmp_path: Path
    ) -> None:
        cache = EngineCache(tmp_path, max_bytes=5000)
        small, large = self.keys(2)
        cache.keep(small, bytes(10))
        assert "more than the 5000" in cache.keep(large, bytes(6000))
        assert cache.engine(small)[0] == bytes(10)

    def test_what_a_writer_that_died_left_goes_after_a_day(self, tmp_path: Path) -> None:
        cache = EngineCache(tmp_path)
        old, new = tmp_path / ".a.engine.x1", tmp_path / ".b.engine.x2"
        for path in (old, new):
            path.write_bytes(b"half")
        os.utime(old, (1e9, 1e9))
        cache.keep(KEY, b"engine")
        assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_said_and_the_engine_used_from_memory(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "write_atomically", fail)
    made, _ = make(tmp_path)
    assert made.engine
    assert os.strerror(code) in made.notes[0]
    assert "built again at the next start" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_said_and_the_engine_used_from_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made, _ = make(tmp_path / "file" / "engines")
    assert made.engine
    assert any("cannot keep it" in note for note in made.notes)


def test_without_a_folder_nothing_is_remembered() -> None:
    assert not make(None)[0].cached


def test_a_failed_build_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    trt = FakeTensorRT()
    trt.refuses = lambda _graph: "no implementation for node Conv_7"
    with pytest.raises(CheckFailed, match=r"tensorrt 10\.3\.0 cannot build the graph: no impl"):
        make(tmp_path, trt, precision="fp16")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_cancelled_build_keeps_nothing(tmp_path: Path) -> None:
    watch = Watch()
    watch.cancelled.set()
    with pytest.raises(CheckFailed, match="cancelled"):
        make(tmp_path, watch=watch)
    assert not list(tmp_path.iterdir())


def test_two_builds_never_run_at_once(tmp_path: Path) -> None:
    """Each would measure the other's kernels."""
    first, second = FakeTensorRT(), FakeTensorRT()
    first.gate, second.gate = threading.Event(), threading.Event()
    second.gate.set()
    threads = [
        threading.Thread(target=make, args=(tmp_path / name, trt))
        for name, trt in (("a", first), ("b", second))
    ]
    threads[0].start()
    assert first.begun.wait(10)
    threads[1].start()
    assert not second.begun.is_set()
    first.gate.set()
    for thread in threads:
        thread.join(20)
    assert first.built
    assert second.built


def test_who_waited_for_another_s_build_of_the_same_engine_takes_it(tmp_path: Path) -> None:
    trt = FakeTensorRT()
    trt.gate = threading.Event()
    made: list[Made] = []
    threads = [
        threading.Thread(target=lambda: made.append(make(tmp_path, trt)[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert trt.begun.wait(10)
    trt.gate.set()
    for thread in threads:
        thread.join(20)
    assert len(trt.built) == 1
    assert made[0].engine == made[1].engine


def test_readers_and_writers_of_one_entry_meet_a_whole_engine_or_none(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=40_000)
    keys = [msgspec.structs.replace(KEY, precision=f"p{i}") for i in range(3)]
    contents = {key.precision: bytes([i + 1]) * (9_000 + i) for i, key in enumerate(keys)}
    wrong: list[str] = []

    def work(seed: int) -> None:
        for i in range(40):
            key = keys[(seed + i) % 3]
            if (seed + i) % 4 == 0:
                trouble = cache.keep(key, contents[key.precision])
                if trouble:
                    wrong.append(trouble)
            found, why_not = cache.engine(key)
            if why_not or (found is not None and found != contents[key.precision]):
                wrong.append(why_not or "another content")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")
def test_the_real_builder_s_engines_are_remembered_too(tmp_path: Path) -> None:
    rtx = installed_tensorrt()
    if rtx is None:
        pytest.skip("tensorrt_rtx is not installed")
    options = Options(level=0)
    first, _ = make(tmp_path, rtx, options=options)
    again, _ = make(tmp_path, rtx, options=options)
    assert (first.cached, again.cached) == (False, True)
    assert again.engine == first.engine
    assert again.key.hardware == hardware_of(rtx, GPU)
    student, _ = make(tmp_path, rtx, options=options, graph=student_graph(), outputs=("logits",))
    assert not student.cached


def test_a_profile_is_part_of_what_is_written(tmp_path: Path) -> None:
    make(tmp_path)
    (path,) = files(tmp_path)
    header = path.read_bytes()[20:].split(b"}}", 1)[0]
    assert b'"tensorrt 10.3.0"' in header
    assert (
        msgspec.json.encode(Profile((1, 1, 1, 3), (32, 8, 8, 3), (32, 32, 32, 3)))
        in path.read_bytes()
    )
