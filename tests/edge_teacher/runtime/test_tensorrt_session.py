"""Engines executed on a scripted GPU whose memory is apart from the host's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.runtime.tensorrt.build import build
from edge_teacher.runtime.tensorrt.key import Options, profile_for
from edge_teacher.runtime.tensorrt.session import TensorRTSession
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.fake_gpu import FakeDriver, FakeTensorRT, fake_cuda
from tests.edge_teacher.runtime.same import same

PROFILE = profile_for((8, 8), largest_batch=4)
BOTH = ["saliency", "features.last"]


def engine(trt: FakeTensorRT) -> bytes:
    return build(trt, teacher_graph(), profile=PROFILE, options=Options()).engine


def opened(
    driver: FakeDriver | None = None, trt: FakeTensorRT | None = None, *, lanes: int = 2
) -> TensorRTSession:
    trt = trt or FakeTensorRT()
    return TensorRTSession(
        trt, fake_cuda(driver), engine(trt), profile=PROFILE, precision="fp16", lanes=lanes
    )


@pytest.mark.parametrize("integrated", [False, True], ids=["copies", "shared memory"])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_any_number_of_images_is_answered_in_one_pass(integrated: bool, count: int) -> None:
    driver = FakeDriver(integrated=integrated)
    session = opened(driver)
    images = pictures(count)
    features, saliency = teacher_answers(images)
    found = session.run(images, BOTH)
    same(found["saliency"], saliency)
    same(found["features.last"], features)
    # The answers are the caller's: the next query does not write into them.
    session.run(pictures(count, seed=5), BOTH)
    same(found["saliency"], saliency)
    assert (driver.calls["cuMemcpyHtoDAsync_v2"] == 0) is integrated


def test_images_of_another_size_within_the_profile_are_answered() -> None:
    session = opened()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 3), np.uint8)
    same(session.run(images, ["saliency"])["saliency"], teacher_answers(images)[1])


def test_images_beyond_the_profile_and_outputs_it_has_not_are_one_sentence() -> None:
    session = opened()
    large = np.zeros((1, 40, 8, 3), np.uint8)
    assert not session.fits(large)
    with pytest.raises(RuntimeFailed, match=r"from \(1, 1\) to \(32, 32\) and not \(40, 8\)"):
        session.run(large, BOTH)
    with pytest.raises(RuntimeFailed, match="has no output logits"):
        session.run(pictures(1), ["logits"])


def test_what_it_says_of_itself() -> None:
    info = opened().info
    assert (info.name, info.version, info.provider) == ("tensorrt", "10.3.0", "Orin")
    assert (info.precision, info.engine, info.gpu) == ("fp16", "ready", "Orin (8.7)")


def test_queries_at_once_have_contexts_of_their_own() -> None:
    """The scripted context fails if two queries are in it."""
    session = opened()

    def ask(seed: int) -> None:
        for i in range(10):
            images = pictures(3 + i % 4, seed=seed)
            same(session.run(images, ["saliency"])["saliency"], teacher_answers(images)[1])

    with ThreadPoolExecutor(5) as pool:
        for _ in pool.map(ask, range(5)):
            pass


def test_memory_for_fewer_contexts_than_wanted_is_enough_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trt = FakeTensorRT()
    trt.contexts = 1
    session = opened(trt=trt)
    assert session.info.threads == 1
    assert "runs 1 at a time: no memory for another context" in caplog.text
    same(session.run(pictures(2), ["saliency"])["saliency"], teacher_answers(pictures(2))[1])


@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate"])
def test_no_memory_at_all_is_one_sentence_and_leaves_nothing_behind(function: str) -> None:
    driver = FakeDriver()
    driver.fail[function] = 2
    with pytest.raises(CheckFailed, match=f"does not fit into the GPU's memory: {function} failed"):
        opened(driver)
    assert (driver.held, driver.streams) == ({}, 0)


def test_an_engine_of_another_version_is_refused_in_tensorrt_s_words() -> None:
    built = engine(FakeTensorRT("10.3.0"))
    with pytest.raises(CheckFailed, match=r"10\.16\.2 cannot load .*plan file is not compatible"):
        TensorRTSession(
            FakeTensorRT("10.16.2"), fake_cuda(), built, profile=PROFILE, precision="fp32"
        )


def test_a_failing_kernel_is_one_sentence_and_the_lane_is_free_again() -> None:
    trt = FakeTensorRT()
    session = opened(trt=trt, lanes=1)
    trt.executes = False
    with pytest.raises(RuntimeFailed, match=r"images \[2, 8, 8, 3\]: an illegal memory access"):
        session.run(pictures(2), BOTH)
    trt.executes = True
    same(session.run(pictures(2), ["saliency"])["saliency"], teacher_answers(pictures(2))[1])


def test_what_the_bindings_raise_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened()

    def fail(*_: object) -> None:
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr("tests.edge_teacher.runtime.fake_gpu._Context.execute_async_v3", fail)
    with pytest.raises(RuntimeFailed, match="incompatible function arguments"):
        session.run(pictures(2), BOTH)


def test_closing_gives_everything_back_and_is_final() -> None:
    driver = FakeDriver()
    trt = FakeTensorRT()
    session = opened(driver, trt)
    session.run(pictures(2), BOTH)
    assert driver.held
    session.close()
    session.close()
    assert (driver.held, driver.streams, trt.contexts) == ({}, 0, 8)
    for _ in range(2):
        with pytest.raises(RuntimeFailed, match="is closed"):
            session.run(pictures(2), BOTH)
