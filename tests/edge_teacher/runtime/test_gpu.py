"""Everything that only a GPU can prove: `pytest -m gpu` gives a verdict with numbers (docs/hardware.md).

The same tests run on the scripted GPU, without the mark, so that they work when somebody has a real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import onnxruntime
import pytest

from edge_teacher.contract.errors import FedsaError
from edge_teacher.runtime import OnnxRuntimeSession, open_session
from edge_teacher.runtime.candidates import candidates
from edge_teacher.runtime.machine import GPU_PROVIDERS, Machine, find_machine
from edge_teacher.runtime.model import Model
from edge_teacher.runtime.opened import Candidate, Opened, Watch
from edge_teacher.runtime.tensorrt.family import EngineFamily
from edge_teacher.runtime.trial import Trial, ms_per_image, require_agreement
from edge_teacher.runtime.worker import Worker
from tests.edge_teacher.runtime.fake_gpu import FakeDriver, FakeTensorRT, fake_cuda
from tests.edge_teacher.runtime.shipped import TEACHERS, graph, half_of
from tests.edge_teacher.runtime.verdict import VERDICT, Row

BUILD_S = 1800
"""A small Jetson may take minutes for one engine."""
THREADS = 4


REAL = [pytest.mark.gpu, pytest.mark.timeout(BUILD_S)]


@pytest.fixture(params=["scripted", pytest.param("real", marks=REAL)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "scripted":
        cuda = fake_cuda(FakeDriver(memory=4 << 30))
        return Machine(cuda, FakeTensorRT(), onnxruntime, {})
    found = find_machine()
    if found.cuda is None:
        pytest.skip(found.absent["tensorrt"])
    gpu = found.cuda.gpu
    trt = "no TensorRT" if found.tensorrt is None else f"TensorRT {found.tensorrt.__version__}"
    VERDICT.device = (
        f"{gpu.name} ({gpu.architecture}), {gpu.memory_bytes / 1e9:.1f} GB, driver for CUDA {gpu.cuda}, "
        f"{trt}, ONNX Runtime {onnxruntime.__version__}"
    )
    return found


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker("test")
    yield found
    found.close()


def model_of(name: str) -> Model:
    single, size = graph(name)
    return Model(name=name, graphs={"fp32": single, "fp16": half_of(name)}, size=size)


def on_the_cpu(model: Model) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(model.graphs["fp32"], threads=THREADS, name=model.name)


def natively(
    model: Model, machine: Machine, folder: Path | None, worker: Worker
) -> list[Candidate]:
    if machine.tensorrt is None:
        pytest.skip(machine.absent["tensorrt"])
    found = candidates(model, machine, threads=THREADS, engines=folder, worker=worker)
    return [candidate for candidate in found if candidate.runtime == "tensorrt"]


def is_real(machine: Machine) -> bool:
    return not isinstance(machine.tensorrt, FakeTensorRT)


def test_memory_reaches_the_gpu_and_comes_back(machine: Machine) -> None:
    cuda = machine.cuda
    assert cuda is not None
    cuda.use()
    stream = cuda.stream()
    buffers = [cuda.buffer(1 << 20) for _ in range(2)]
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    for buffer, shift in zip(buffers, (0, 1), strict=True):
        buffer.host[:] = data + shift
        buffer.to_device(1 << 20, stream)
    for buffer, shift in zip(buffers, (0, 1), strict=True):
        cuda.wait(stream)
        if not cuda.gpu.integrated:
            buffer.host[:] = 0
        buffer.to_host(1 << 20, stream)
        cuda.wait(stream)
        assert np.array_equal(buffer.host, data + np.uint8(shift))
        buffer.free()
    cuda.end(stream)


@pytest.mark.parametrize(
    ("machine", "path"),
    [
        pytest.param("scripted", TEACHERS[0], id="scripted"),
        *(pytest.param("real", path, id=path.stem, marks=REAL) for path in TEACHERS),
    ],
    indirect=["machine"],
)
def test_tensorrt_answers_as_the_cpu_does(
    machine: Machine, path: Path, tmp_path: Path, worker: Worker
) -> None:
    """In both precisions; then from the cache, and features alone."""
    model = model_of(path.stem)
    cpu = on_the_cpu(model)
    images = model.images()
    wanted = cpu.run(images, cpu.outputs)
    for candidate in natively(model, machine, tmp_path, worker):
        opened = candidate.open(Watch())
        off = require_agreement(opened.session, wanted, images, candidate.precision)
        times = ms_per_image(opened.session, images)
        alone = features_alone(opened, images, worker)
        opened.close()
        started = time.monotonic()
        again = candidate.open(Watch())
        require_agreement(again.session, wanted, images, candidate.precision)
        from_cache_s = time.monotonic() - started
        assert again.build_s is None
        again.close()
        if is_real(machine):
            trial = trial_of(candidate, opened.build_s, times, off)
            VERDICT.rows.append(
                Row(
                    teacher=path.stem,
                    trial=trial,
                    cpu_ms_per_image=ms_per_image(cpu, images),
                    features_alone=alone,
                    from_cache_s=from_cache_s,
                )
            )


def trial_of(
    candidate: Candidate,
    build_s: float | None = None,
    times: tuple[float, ...] = (),
    off: float | None = None,
) -> Trial:
    return Trial(
        runtime=candidate.runtime,
        provider=candidate.provider,
        precision=candidate.precision,
        version=candidate.version,
        build_s=build_s,
        ms_per_image=times,
        largest_difference=off,
    )


def features_alone(opened: Opened, images: np.ndarray, worker: Worker) -> float:
    """Time of the features alone over that of everything, once their own engine had its chance."""
    family = opened.session
    assert isinstance(family, EngineFamily)
    features = [name for name in family.outputs if name.startswith("features.")]
    wanted = family.run(images, features)
    done = threading.Event()
    worker.submit(done.set)
    assert done.wait(BUILD_S)
    found = family.run(images, features)
    for name in features:
        assert np.abs(found[name] - wanted[name]).max() <= 1e-2 * np.abs(wanted[name]).max()
    return fastest(lambda: family.run(images, features)) / fastest(
        lambda: family.run(images, family.outputs)
    )


def fastest(task: object, rounds: int = 20) -> float:
    assert callable(task)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return min(times)


def test_any_number_and_size_of_images_from_many_threads(
    machine: Machine, tmp_path: Path, worker: Worker
) -> None:
    model = model_of("teacher-0")
    cpu = on_the_cpu(model)
    opened = natively(model, machine, tmp_path, worker)[-1].open(Watch())  # fp32
    random = np.random.default_rng(0)

    def ask(seed: int) -> None:
        for count, height, width in ((1, 32, 32), (33, 32, 32), (5, 48, 20), (70, 32, 32)):
            images = random.integers(0, 256, (count, height, width, 3), np.uint8)
            assert opened.fits(images)
            wanted = cpu.run(images, ["features." + tap])
            found = opened.session.run(images, ["features." + tap])
            (have,), (want,) = found.values(), wanted.values()
            assert have.shape == want.shape
            assert np.abs(have - want).max() <= 1e-2 * np.abs(want).max(), seed

    tap = next(name for name in cpu.outputs if name.startswith("features.")).removeprefix(
        "features."
    )
    with ThreadPoolExecutor(6) as pool:
        for _ in pool.map(ask, range(6)):
            pass
    opened.close()


def test_closing_gives_the_memory_back(machine: Machine, tmp_path: Path, worker: Worker) -> None:
    cuda = machine.cuda
    assert cuda is not None
    cuda.use()
    model = model_of("teacher-0")
    candidate = natively(model, machine, tmp_path, worker)[-1]
    candidate.open(Watch()).close()  # what CUDA and TensorRT keep for good is taken now
    before = cuda.free_bytes()
    for _ in range(3):
        opened = candidate.open(Watch())
        opened.session.run(model.images(), opened.session.outputs)
        opened.close()
    assert before - cuda.free_bytes() < 32 << 20


def test_onnx_runtime_s_gpu_providers_are_proved_or_refused_with_a_reason(
    machine: Machine, tmp_path: Path, worker: Worker
) -> None:
    model = model_of("teacher-0")
    cpu = on_the_cpu(model)
    images = model.images()
    wanted = cpu.run(images, cpu.outputs)
    runtime = machine.onnxruntime if is_real(machine) else with_gpu_providers()
    found = candidates(
        model,
        Machine(machine.cuda, None, runtime, machine.absent),
        threads=THREADS,
        engines=tmp_path,
        worker=worker,
    )
    if is_real(machine) and not found:
        pytest.skip("this ONNX Runtime was built without a GPU provider")
    trials = [tried(candidate, wanted, images) for candidate in found]
    if is_real(machine):
        times = ms_per_image(cpu, images)
        VERDICT.rows += [Row(teacher=model.name, trial=t, cpu_ms_per_image=times) for t in trials]
    else:
        assert [t.label for t in trials] == [
            f"onnxruntime {provider} {precision}"
            for provider in GPU_PROVIDERS
            for precision in ("fp16", "fp32")
        ]
        # This ONNX Runtime has none of them, and says so instead of computing on the CPU.
        assert all("has no working" in trial.reason for trial in trials)
    assert all(trial.reason for trial in trials if trial.state == "refused")


def with_gpu_providers() -> ModuleType:
    """An ONNX Runtime that says it was built with GPU providers."""
    module = ModuleType("onnxruntime")
    module.__version__ = "1"  # type: ignore[attr-defined]
    module.get_available_providers = lambda: [*GPU_PROVIDERS, "CPUExecutionProvider"]  # type: ignore[attr-defined]
    return module


def tried(candidate: Candidate, wanted: Mapping[str, np.ndarray], images: np.ndarray) -> Trial:
    try:
        opened = candidate.open(Watch())
        off = require_agreement(opened.session, wanted, images, candidate.precision)
    except FedsaError as error:
        return msgspec.structs.replace(trial_of(candidate), state="refused", reason=str(error))
    return trial_of(candidate, opened.build_s, ms_per_image(opened.session, images), off)


def test_the_agent_s_way_answers_all_along_and_picks_one(machine: Machine, tmp_path: Path) -> None:
    model = model_of("teacher-1")
    cpu = on_the_cpu(model)
    images = model.images()
    wanted = cpu.run(images, cpu.outputs)
    settled = threading.Event()

    def changed() -> None:
        if any(trial.state == "picked" for trial in session.trials):
            settled.set()

    session = open_session(
        model, threads=THREADS, engines=tmp_path, changed=changed, find=lambda: machine
    )
    queries = 0
    while not settled.is_set() or not queries:
        require_agreement(session, wanted, images, "fp16")
        queries += 1
    require_agreement(session, wanted, images, "fp16")
    if is_real(machine):
        VERDICT.rows += [
            Row(
                teacher=model.name,
                trial=trial,
                cpu_ms_per_image=session.trials[0].ms_per_image,
            )
            for trial in session.trials
        ]
    session.close()
