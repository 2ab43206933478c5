"""The choice: the CPU at once, then what measures best of that which answers as the CPU does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.contract.messages import RuntimeInfo
from edge_teacher.runtime import LiveSession, Model, choice, live, open_session
from edge_teacher.runtime.machine import Machine, find_machine
from edge_teacher.runtime.session import Session
from edge_teacher.runtime.tensorrt import family
from export.checks.tensorrt import installed_tensorrt
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.fake_gpu import FakeDriver, FakeTensorRT, fake_cuda
from tests.edge_teacher.runtime.same import same

WAIT_S = 20
IMAGES = pictures(3)
FEATURES, SALIENCY = teacher_answers(IMAGES)
SINGLE, HALF = teacher_graph(), teacher_graph() + b"\x32\x04half"  # a doc string tells them apart


def model(**changes: Any) -> Model:
    fields: dict[str, Any] = {"name": "mine", "graphs": {"fp32": SINGLE}, "size": (8, 8), **changes}
    return Model(**fields)


class Gpu:
    """A machine with a scripted GPU, and what has been heard from a session that was opened on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.trt, self.driver = FakeTensorRT(), FakeDriver()
        self.times = {"cpu": 10.0, "fp32": 2.0, "fp16": 1.0}
        self.heard = threading.Condition()
        self.opened: list[LiveSession] = []
        for module in (live, family):
            monkeypatch.setattr(module, "ms_per_image", self._time)

    def _time(self, session: Session, _images: np.ndarray) -> tuple[float, float]:
        """The scripted milliseconds: for every precision of the GPU, and for all but all outputs."""
        info = session.info
        ms = self.times["cpu" if info.provider == "CPUExecutionProvider" else info.precision]
        if set(session.outputs) != {"saliency", "features.last"}:
            ms *= self.times.get("part", 0.5)
        return 2 * ms, ms

    def machine(self) -> Machine:
        import onnxruntime

        return Machine(
            fake_cuda(self.driver),
            self.trt,
            onnxruntime,
            {"onnxruntime CUDAExecutionProvider": "not in it"},
        )

    def open(self, what: Model | None = None, *, wait: bool = True, **options: Any) -> LiveSession:
        found = open_session(
            what or model(),
            threads=1,
            engines=self.folder,
            changed=self._changed,
            wait=wait,
            find=self.machine,
            **options,
        )
        self.opened.append(found)
        return found

    def _changed(self) -> None:
        with self.heard:
            self.heard.notify_all()

    def until(self, session: LiveSession, wanted: Callable[[RuntimeInfo], bool]) -> RuntimeInfo:
        """The session's word once it is as wanted; it is looked at again whenever it has changed."""
        with self.heard:
            assert self.heard.wait_for(lambda: wanted(session.info), WAIT_S), session.info
        return session.info


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu(tmp_path, monkeypatch)
    yield found
    if isinstance(found.trt, FakeTensorRT) and found.trt.gate is not None:
        found.trt.gate.set()
    for session in found.opened:
        session.close()


def right(session: Session) -> None:
    found = session.run(IMAGES, ["saliency", "features.last"])
    same(found["saliency"], SALIENCY)
    same(found["features.last"], FEATURES)


class TestWithoutAGpu:
    def test_the_cpu_is_picked_and_a_line_says_why_not_each_other(self) -> None:
        session = open_session(model(), threads=1)
        right(session)
        info = session.info
        assert (info.name, info.provider, info.precision) == (
            "onnxruntime",
            "CPUExecutionProvider",
            "fp32",
        )
        assert info.engine == "none"
        assert set(info.why_not) == {
            "tensorrt",
            "onnxruntime TensorrtExecutionProvider",
            "onnxruntime CUDAExecutionProvider",
        }
        assert all("\n" not in reason for reason in info.why_not.values())
        # Nothing to choose from is nothing to measure, and no thread.
        assert session.trials == ()
        assert "runtime" not in {thread.name for thread in threading.enumerate()}

    def test_what_a_student_s_cpu_prefers_comes_first(self) -> None:
        session = open_session(model(graphs={"fp32": SINGLE, "int8_cpu": HALF}), threads=1)
        assert session.info.precision == "int8_cpu"
        with pytest.raises(CheckFailed, match="comes as int8_tensorrt; this device's runtime"):
            open_session(model(graphs={"int8_tensorrt": SINGLE}), threads=1)

    def test_what_does_not_accept_itself_is_not_opened(self) -> None:
        def refuse(_session: Session, dialect: str) -> None:
            raise CheckFailed(f"{dialect} fails its canary")

        with pytest.raises(CheckFailed, match="fp32 fails its canary"):
            open_session(model(accept=refuse), threads=1)

    def test_neither_onnx_runtime_nor_a_gpu_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "_base", lambda *_: None)
        with pytest.raises(
            CheckFailed, match=r"nothing on this machine executes mine \(tensorrt: no"
        ):
            open_session(model(), threads=1)

    def test_the_real_machine_has_a_reason_for_all_that_is_absent(self) -> None:
        machine = find_machine()
        assert (machine.cuda is None) == ("tensorrt" in machine.absent or machine.tensorrt is None)
        assert machine.onnxruntime is not None


class TestPicking:
    def test_the_fastest_that_agrees_answers(self, gpu: Gpu) -> None:
        session = gpu.open(model(graphs={"fp32": SINGLE, "fp16": HALF}))
        right(session)
        info = session.info
        assert (info.name, info.precision, info.engine) == ("tensorrt", "fp16", "ready")
        assert info.ms_per_image == (2.0, 1.0)
        by_label = {trial.label: trial for trial in session.trials}
        assert [t.state for t in session.trials] == ["usable", "picked", "usable"]
        assert by_label["tensorrt Orin fp16"].largest_difference == pytest.approx(0, abs=1e-6)
        assert by_label["tensorrt Orin fp16"].build_s is not None
        assert "slower than tensorrt Orin fp16: 2 ms" in info.why_not["tensorrt Orin fp32"]
        assert "slower" in info.why_not["onnxruntime CPUExecutionProvider fp32"]
        assert info.why_not["onnxruntime CUDAExecutionProvider"] == "not in it"

    def test_a_gpu_that_is_slower_than_the_cpu_is_not_used(self, gpu: Gpu) -> None:
        gpu.times["fp32"] = 11.0
        session = gpu.open()
        right(session)
        assert session.info.name == "onnxruntime"
        assert session.info.engine == "ready"  # it works, and is not worth it
        assert gpu.driver.held == {}  # and holds no memory

    def test_half_precision_that_answers_otherwise_is_refused_with_its_reason(
        self, gpu: Gpu
    ) -> None:
        gpu.trt.factor = lambda graph: 1.2 if b"half" in graph else 1.0
        session = gpu.open(model(graphs={"fp32": SINGLE, "fp16": HALF}))
        right(session)
        assert session.info.precision == "fp32"
        assert (
            "features.last differs from the CPU's by 0.2"
            in session.info.why_not["tensorrt Orin fp16"]
        )

    def test_a_student_s_canary_has_the_last_word(self, gpu: Gpu) -> None:
        def canary(_session: Session, dialect: str) -> None:
            if dialect == "int8_tensorrt":
                raise CheckFailed("answers 20.0% of its canary batch as at export")

        graphs = {"fp32": SINGLE, "int8_cpu": SINGLE, "int8_tensorrt": HALF}
        session = gpu.open(model(graphs=graphs, accept=canary))
        assert session.info.precision == "fp32"
        assert session.info.name == "tensorrt"
        assert "20.0% of its canary" in session.info.why_not["tensorrt Orin int8_tensorrt"]

    def test_what_the_cpu_runs_in_int8_is_no_measure_of_fp32(self, gpu: Gpu) -> None:
        gpu.trt.factor = lambda _graph: 1.2  # far beyond what FP32 may differ from FP32
        session = gpu.open(model(graphs={"fp32": SINGLE, "int8_cpu": SINGLE}))
        assert (session.info.name, session.info.precision) == ("tensorrt", "fp32")
        assert session.trials[1].largest_difference == pytest.approx(0.2, rel=1e-3)

    def test_a_failing_build_keeps_what_works_and_says_why(self, gpu: Gpu) -> None:
        gpu.trt.refuses = lambda _graph: "no implementation for node Conv_7"
        session = gpu.open()
        right(session)
        info = session.info
        assert (info.name, info.engine) == ("onnxruntime", "failed")
        assert info.gpu == "Orin (8.7)"
        assert "no implementation for node Conv_7" in info.detail
        assert [trial.state for trial in session.trials] == ["picked", "refused"]

    def test_the_real_builder_s_engine_that_the_real_runtime_cannot_load_here(
        self, gpu: Gpu
    ) -> None:
        """TensorRT-RTX builds without a GPU, and then says in its own words that there is none."""
        rtx = installed_tensorrt()
        if rtx is None:
            pytest.skip("tensorrt_rtx is not installed")
        gpu.trt = rtx  # type: ignore[assignment]
        session = gpu.open()
        right(session)
        assert (session.info.name, session.info.engine) == ("onnxruntime", "failed")
        assert "cannot load the engine of mine: IRuntime::deserializeCudaEngine" in (
            session.info.detail
        )
        assert len(list(gpu.folder.glob("*.engine"))) == 1

    def test_of_pages_that_a_runtime_says_the_card_gets_a_line(self, gpu: Gpu) -> None:
        def refuse(session: Session, _dialect: str) -> None:
            if session.info.name == "tensorrt":
                raise CheckFailed("word\n" * 1000)

        reason = gpu.open(model(accept=refuse)).info.why_not["tensorrt Orin fp32"]
        assert len(reason) < 500
        assert reason.startswith("word word")

    def test_without_onnx_runtime_the_start_waits_for_an_engine(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "_base", lambda *_: None)
        session = gpu.open(wait=False)
        right(session)
        assert session.info.name == "tensorrt"
        (trial,) = session.trials
        assert trial.largest_difference is None  # there was nothing to compare with

    def test_the_next_start_takes_the_engine_from_the_cache(self, gpu: Gpu) -> None:
        gpu.open()
        (build,) = gpu.trt.built
        session = gpu.open()
        assert gpu.trt.built == [build]
        assert session.trials[-1].build_s is None
        right(session)

    def test_a_cached_engine_that_does_not_load_is_built_again(self, gpu: Gpu) -> None:
        gpu.open()
        (path,) = gpu.folder.glob("*.engine")
        # Sound to the byte, and yet TensorRT will not have it.
        real, gpu.trt.Runtime = gpu.trt.Runtime, lambda log: Refusing(real(log), gpu.trt)
        session = gpu.open()
        right(session)
        assert session.info.name == "tensorrt"
        assert "cannot be loaded" in session.trials[-1].notes[0]
        assert path.exists()


class Refusing:
    """A runtime that refuses an engine until another one has been built."""

    def __init__(self, runtime: Any, trt: FakeTensorRT) -> None:
        self._runtime, self._trt = runtime, trt

    def deserialize_cuda_engine(self, engine: bytes) -> Any:
        return self._runtime.deserialize_cuda_engine(engine) if len(self._trt.built) > 1 else None


class TestInTheBackground:
    def test_the_cpu_answers_while_an_engine_is_built_and_then_it_does(self, gpu: Gpu) -> None:
        gpu.trt.gate = threading.Event()
        session = gpu.open(wait=False)
        assert gpu.trt.begun.wait(WAIT_S)
        right(session)
        info = session.info
        assert (info.name, info.engine) == ("onnxruntime", "building")
        assert session.switched == 0
        assert 0 < info.engine_progress < 1
        gpu.trt.gate.set()
        info = gpu.until(session, lambda info: info.engine == "ready")
        assert (info.name, info.engine_progress) == ("tensorrt", 0.0)
        assert session.switched == 1
        right(session)

    def test_queries_go_on_right_while_it_changes_over(self, gpu: Gpu) -> None:
        gpu.trt.gate = threading.Event()
        session = gpu.open(model(graphs={"fp32": SINGLE, "fp16": HALF}), wait=False)
        stop = threading.Event()

        def ask() -> int:
            asked = 0
            while not stop.is_set():
                right(session)
                asked += 1
            return asked

        with ThreadPoolExecutor(3) as pool:
            askers = [pool.submit(ask) for _ in range(3)]
            gpu.trt.gate.set()
            gpu.until(session, lambda info: info.engine == "ready")
            stop.set()
            assert all(asker.result(WAIT_S) for asker in askers)
        assert session.info.name == "tensorrt"

    def test_closing_cancels_a_build(self, gpu: Gpu) -> None:
        gpu.trt.gate = threading.Event()
        session = gpu.open(wait=False)
        assert gpu.trt.begun.wait(WAIT_S)
        session.close()
        assert not gpu.trt.built
        assert "runtime" not in {thread.name for thread in threading.enumerate()}
        right(session)  # the CPU still answers who asks

    def test_what_proves_itself_after_the_end_is_not_taken(self, gpu: Gpu) -> None:
        def close_meanwhile(tried: Session, _dialect: str) -> None:
            if tried.info.name == "tensorrt":
                gpu.opened[0].close()

        gpu.trt.gate = threading.Event()
        session = gpu.open(model(accept=close_meanwhile), wait=False)
        assert gpu.trt.begun.wait(WAIT_S)
        gpu.trt.gate.set()
        thread = session._worker._thread
        assert thread is not None
        thread.join(WAIT_S)
        assert session.info.name == "onnxruntime"
        assert gpu.driver.held == {}

    def test_closing_gives_the_gpu_s_memory_back(self, gpu: Gpu) -> None:
        session = gpu.open()
        assert gpu.driver.held
        session.close()
        assert gpu.driver.held == {}


class TestAnswering:
    def test_sizes_the_engine_has_not_are_answered_on_the_cpu_and_said(
        self, gpu: Gpu, caplog: pytest.LogCaptureFixture
    ) -> None:
        session = gpu.open()
        large = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), np.uint8)
        for _ in range(2):
            same(session.run(large, ["saliency"])["saliency"], teacher_answers(large)[1])
        assert session.info.name == "tensorrt"
        assert "images of 40x40 are answered on the CPU" in session.info.detail
        assert caplog.text.count("images of 40x40") == 1

    def test_a_gpu_that_fails_is_given_up_the_answer_is_right_and_it_is_said(
        self, gpu: Gpu, caplog: pytest.LogCaptureFixture
    ) -> None:
        session = gpu.open()
        gpu.trt.executes = False
        right(session)
        info = session.info
        assert (info.name, info.engine) == ("onnxruntime", "failed")
        assert "an illegal memory access was encountered" in info.detail
        assert "tensorrt Orin fp32" in info.why_not
        assert "the CPU answers instead" in caplog.text
        assert gpu.driver.held == {}

    def test_a_gpu_that_takes_nothing_back_any_more_costs_no_query_its_answer(
        self, gpu: Gpu, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As after an illegal access: every later call fails too."""
        session = gpu.open()
        gpu.trt.executes = False
        gpu.driver.fail = dict.fromkeys(
            ("cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2"), 700
        )
        right(session)
        assert session.info.engine == "failed"
        assert "cannot be given back: cuMemFree_v2 failed with 700" in caplog.text
        right(session)

    def test_features_alone_get_an_engine_of_their_own(self, gpu: Gpu) -> None:
        session = gpu.open()
        same(session.run(IMAGES, ["features.last"])["features.last"], FEATURES)
        assert wait_for_parts(session)
        assert len(gpu.trt.built) == 2
        assert b"ReduceMean" not in gpu.trt.built[1]
        same(session.run(IMAGES, ["features.last"])["features.last"], FEATURES)
        right(session)
        # The next start has it too.
        again = gpu.open()
        again.run(IMAGES, ["features.last"])
        assert wait_for_parts(again)
        assert len(gpu.trt.built) == 2

    @pytest.mark.parametrize("trouble", ["slow", "wrong", "refused"])
    def test_a_part_that_is_no_gain_is_not_kept(
        self, gpu: Gpu, trouble: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = gpu.open()
        held = sum(map(len, gpu.driver.held.values()))
        if trouble == "slow":
            gpu.times["part"] = 0.99
        elif trouble == "wrong":
            gpu.trt.factor = lambda _graph: 1.5
        else:
            gpu.trt.refuses = lambda _graph: "no"
        whole.run(IMAGES, ["features.last"])
        assert not wait_for_parts(whole)
        same(whole.run(IMAGES, ["features.last"])["features.last"], FEATURES)
        assert sum(map(len, gpu.driver.held.values())) == held
        if trouble != "slow":
            assert "features.last alone go on with the whole engine" in caplog.text


def wait_for_parts(session: LiveSession) -> bool:
    """Once everything that was ordered is done: whether the first part that was asked for is used."""
    done = threading.Event()
    session._worker.submit(done.set)
    assert done.wait(WAIT_S)
    assert session._use is not None
    found = session._use.opened.session
    assert isinstance(found, family.EngineFamily)
    return next(iter(found._parts.values())) is not None
