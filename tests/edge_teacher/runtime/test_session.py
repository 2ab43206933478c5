"""What holds for every session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from edge_teacher.runtime import OnnxRuntimeSession, run_in_batches
from edge_teacher.runtime.session import InPieces
from tests.edge_teacher.nets import pictures, teacher_answers, teacher_graph
from tests.edge_teacher.runtime.same import same


class Counted(OnnxRuntimeSession):
    """Notes how many images it was asked about."""

    def __init__(self) -> None:
        super().__init__(teacher_graph(), threads=1)
        self.sizes: list[int] = []

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        self.sizes.append(len(images))
        return super().run(images, outputs)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_no_more_images_at_once_than_a_session_takes(count: int, sizes: list[int]) -> None:
    inner = Counted()
    session = InPieces(inner, 4)
    features, saliency = teacher_answers(pictures(count))
    found = session.run(pictures(count), ["saliency", "features.last"])
    same(found["saliency"], saliency)
    same(found["features.last"], features)
    assert inner.sizes == sizes
    assert (session.outputs, session.info) == (inner.outputs, inner.info)


def test_of_any_number_of_images_only_what_is_left_of_each_is_kept() -> None:
    inner = Counted()
    means = run_in_batches(
        inner, pictures(9), "features.last", batch=4, reduce=lambda maps, _where: maps.mean((2, 3))
    )
    same(means, teacher_answers(pictures(9))[0].mean((2, 3)))
    assert inner.sizes == [4, 4, 1]
    with pytest.raises(ValueError, match="no images"):
        run_in_batches(inner, pictures(0), "saliency")
