"""How far a GPU's runtime is asked to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edge_teacher.contract.errors import RuntimeFailed
from edge_teacher.runtime import Model, onnxruntime
from edge_teacher.runtime.candidates import candidates
from edge_teacher.runtime.machine import Machine
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.worker import Worker
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.fake_gpu import fake_cuda
from tests.edge_teacher.runtime.same import same

PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
HOLDS = 64
"""Images at once; with more the GPU is out of memory."""


class OnGpu(onnxruntime.OnnxRuntimeSession):
    """ONNX Runtime with a GPU that has little memory."""

    def __init__(self, graph: bytes, **options: Any) -> None:
        assert options.pop("provider") in PROVIDERS
        options.pop("provider_options")
        super().__init__(graph, **options)

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        if len(images) > HOLDS:
            raise RuntimeFailed("out of memory")
        return super().run(images, outputs)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_is_asked_about_few_images_at_once_and_of_sizes_near_the_network_s(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "OnnxRuntimeSession", OnGpu)
    built = ModuleType("onnxruntime")
    built.__version__ = "1"  # type: ignore[attr-defined]
    built.get_available_providers = lambda: [provider]  # type: ignore[attr-defined]
    model = Model(name="mine", graphs={"fp32": teacher_graph()}, size=(8, 8))
    (found,) = candidates(
        model, Machine(fake_cuda(), None, built, {}), threads=1, engines=None, worker=Worker("w")
    )
    opened = found.open(Watch())
    images = pictures(2 * HOLDS)
    same(opened.session.run(images, ["saliency"])["saliency"], teacher_answers(images)[1])
    assert opened.fits(np.zeros((1, 32, 32, 3), np.uint8))
    assert not opened.fits(np.zeros((1, 40, 40, 3), np.uint8))
