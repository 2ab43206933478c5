"""The driver's functions, called through real C function pointers."""

from __future__ import annotations

import numpy as np
import pytest

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.runtime import cuda as module
from edge_teacher.runtime.cuda import Cuda, Gpu
from tests.edge_teacher.runtime.fake_gpu import OUT_OF_MEMORY, FakeDriver


def test_what_the_gpu_is() -> None:
    assert Cuda(FakeDriver(integrated=True)).gpu == Gpu(
        name="Orin", architecture="8.7", memory_bytes=1 << 30, integrated=True, cuda="12.6"
    )


def test_no_driver_and_no_gpu_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARY", "libcuda-that-nobody-has.so.1")
    with pytest.raises(CheckFailed, match="no CUDA driver: libcuda-that-nobody-has"):
        Cuda()
    with pytest.raises(CheckFailed, match="the CUDA driver sees no GPU"):
        Cuda(FakeDriver(devices=0))
    broken = FakeDriver()
    broken.fail["cuInit"] = 999
    with pytest.raises(CheckFailed, match=r"no GPU can be used: cuInit failed with 999 \(CUDA_ERR"):
        Cuda(broken)


@pytest.mark.parametrize("integrated", [False, True])
def test_bytes_reach_the_gpu_and_come_back(integrated: bool) -> None:
    driver = FakeDriver(integrated=integrated)
    cuda = Cuda(driver)
    cuda.use()
    stream = cuda.stream()
    before = cuda.free_bytes()
    buffer = cuda.buffer(100)
    # Where the GPU shares the memory of the CPU, nothing is held twice and nothing copied.
    assert before - cuda.free_bytes() == (100 if integrated else 200)
    buffer.host[:] = np.arange(100, dtype=np.uint8)
    buffer.to_device(100, stream)
    if not integrated:
        buffer.host[:] = 0
    buffer.to_host(60, stream)
    cuda.wait(stream)
    assert np.array_equal(buffer.host[:60], np.arange(60, dtype=np.uint8))
    assert driver.calls["cuMemcpyHtoDAsync_v2"] == (0 if integrated else 1)
    buffer.free()
    cuda.end(stream)
    assert (driver.held, driver.streams) == ({}, 0)


def test_a_buffer_that_the_gpu_has_no_room_for_leaves_nothing_behind() -> None:
    driver = FakeDriver(memory=150)
    cuda = Cuda(driver)
    cuda.use()
    with pytest.raises(RuntimeFailed, match=f"cuMemAlloc_v2 failed with {OUT_OF_MEMORY}"):
        cuda.buffer(100)
    assert driver.held == {}
