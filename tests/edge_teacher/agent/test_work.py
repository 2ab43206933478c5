"""What a query keeps of the steps it was part of."""

from __future__ import annotations

import numpy as np
import pytest

from edge_teacher.agent.work import Inference, Listener
from edge_teacher.contract.messages import Answered, SaliencyQuery
from edge_teacher.runtime import OnnxRuntimeSession
from tests.edge_teacher.nets import pictures, teacher_graph


class Query:
    """One that has been taken."""

    job = about = None
    request, tensors, wanted = SaliencyQuery(block=""), None, True

    def answer(self, body: object, tensors: dict[str, np.ndarray]) -> None:
        self.answered = tensors

    def refuse(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize(("rows", "copied"), [(3, True), (4, False), (8, False)])
def test_a_small_part_of_a_step_does_not_keep_all_of_it(rows: int, copied: bool) -> None:
    query = Query()
    inference = Inference(
        session=OnnxRuntimeSession(teacher_graph(), threads=1),
        images=pictures(rows),
        pixels="",
        mirrored=False,
        outputs=frozenset({"saliency"}),
        keep=lambda found, _where: found,
        finish=lambda whole, _ms: (Answered(compute_ms=0), dict(whole)),
        needs_bytes=0,
    )
    listener = Listener(query, inference, rows, lambda: None)  # type: ignore[arg-type]
    step = np.arange(8 * 4 * 4, dtype=np.float32).reshape(8, 4, 4).copy()
    assert listener.take({"saliency": step[:rows]}, slice(0, rows), 0.1)
    listener.finish()
    found = query.answered["saliency"]
    assert np.array_equal(found, step[:rows])
    assert np.shares_memory(found, step) != copied
