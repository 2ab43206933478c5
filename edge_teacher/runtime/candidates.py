"""Every way this machine could execute a model on its GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cut import outputs_of
from edge_teacher.runtime.machine import Machine
from edge_teacher.runtime.model import GPU_DIALECTS, Model
from edge_teacher.runtime.opened import Candidate, Opened, Watch
from edge_teacher.runtime.session import InPieces
from edge_teacher.runtime.tensorrt.cache import EngineCache
from edge_teacher.runtime.tensorrt.family import EngineFamily
from edge_teacher.runtime.tensorrt.key import (
    Hardware,
    Options,
    Profile,
    digest_of,
    key_of,
    profile_for,
)
from edge_teacher.runtime.tensorrt.maker import EngineMaker, Made
from edge_teacher.runtime.tensorrt.session import TensorRTSession
from edge_teacher.runtime.worker import Worker

MAX_PROVIDER_CACHES = 4
"""Folders of engines that ONNX Runtime builds by itself."""


def candidates(
    model: Model, machine: Machine, *, threads: int, engines: Path | None, worker: Worker
) -> list[Candidate]:
    """Likely the fastest first. Without `engines`, a folder, what is built lives as long as its session."""
    found: list[Candidate] = []
    dialects = [dialect for dialect in GPU_DIALECTS if dialect in model.graphs]
    if machine.tensorrt is not None:
        found += [_tensorrt(model, dialect, machine, engines, worker) for dialect in dialects]
    for provider in machine.providers:
        # It would build the same engines once more, with a cache that it keeps by itself.
        if provider == "TensorrtExecutionProvider" and machine.tensorrt is not None:
            continue
        found += [
            _onnxruntime(model, dialect, provider, machine, engines, threads)
            for dialect in dialects
            if dialect != "int8_tensorrt" or provider == "TensorrtExecutionProvider"
        ]
    return found


def _tensorrt(
    model: Model, dialect: str, machine: Machine, engines: Path | None, worker: Worker
) -> Candidate:
    module, cuda, graph = machine.tensorrt, machine.cuda, model.graphs[dialect]
    if module is None or cuda is None:
        raise ValueError("TensorRT needs its module and a GPU")
    cache = None if engines is None else EngineCache(engines)
    maker = EngineMaker(module, cuda.gpu, cache)
    profile = profile_for(model.size)

    def opened(made: Made) -> TensorRTSession:
        return TensorRTSession(
            module, cuda, made.engine, profile=profile, precision=dialect, name=model.name
        )

    def made_and_opened(outputs: tuple[str, ...], watch: Watch) -> tuple[TensorRTSession, Made]:
        cuda.use()  # parts are made on another thread than the whole may have been
        made = maker.make(
            graph, outputs, precision=dialect, profile=profile, watch=watch, name=model.name
        )
        try:
            return opened(made), made
        except CheckFailed:
            if not made.cached:
                raise
            again = maker.rebuild(made, graph, watch, model.name)
            return opened(again), again

    def open_(watch: Watch) -> Opened:
        session, made = made_and_opened(outputs_of(graph, model.name), watch)
        quiet = Watch(cancelled=watch.cancelled)
        family = EngineFamily(
            session,
            lambda outputs: made_and_opened(outputs, quiet)[0],
            model.images(),
            worker,
            model.name,
        )
        return Opened(
            family, family.fits, family.close, None if made.cached else made.seconds, made.notes
        )

    return Candidate("tensorrt", cuda.gpu.name, dialect, module.__version__, open_)


def _onnxruntime(
    model: Model,
    dialect: str,
    provider: str,
    machine: Machine,
    engines: Path | None,
    threads: int,
) -> Candidate:
    if machine.onnxruntime is None or machine.cuda is None:
        raise ValueError("a GPU provider needs ONNX Runtime and a GPU")
    version, gpu = machine.onnxruntime.__version__, machine.cuda.gpu
    hardware = Hardware(
        tensorrt=f"onnxruntime {version}", gpu=gpu.name, architecture=gpu.architecture
    )

    def open_(_watch: Watch) -> Opened:
        from edge_teacher.runtime.onnxruntime import OnnxRuntimeSession

        options: dict[str, str] = {}
        profile = profile_for(model.size)
        if provider == "TensorrtExecutionProvider":
            options = _shapes(profile)
            if engines is not None:
                key = key_of(
                    hardware,
                    model.graphs[dialect],
                    outputs_of(model.graphs[dialect], model.name),
                    precision=dialect,
                    profile=profile,
                    options=Options(),
                )
                options |= _kept(engines, digest_of(key)[:32])
        session = OnnxRuntimeSession(
            model.graphs[dialect],
            threads=threads,
            name=model.name,
            provider=provider,
            provider_options=options,
            precision=dialect,
        )
        # Beyond the profile TensorRT would build another engine while a query waits for it, and CUDA may run
        # out of memory, after which the GPU is not trusted before a restart.
        return Opened(InPieces(session, profile.most[0]), profile.takes)

    return Candidate("onnxruntime", provider, dialect, version, open_)


def _shapes(profile: Profile) -> dict[str, str]:
    """The profile as ONNX Runtime's TensorRT provider takes it."""
    return {
        f"trt_profile_{name}_shapes": "images:" + "x".join(map(str, shape))
        for name, shape in (("min", profile.least), ("opt", profile.best), ("max", profile.most))
    }


def _kept(engines: Path, digest: str) -> dict[str, str]:
    """A folder of its own for what ONNX Runtime's provider remembers: it looks at less than our key has."""
    folder = engines / f"onnxruntime-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
        others = sorted(engines.glob("onnxruntime-*"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return {}  # nothing is remembered; what is built is used
    for old in others[:-MAX_PROVIDER_CACHES]:
        shutil.rmtree(old, ignore_errors=True)
    path = str(folder)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": path,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": path,
    }
