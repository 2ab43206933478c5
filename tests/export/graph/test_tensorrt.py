"""Every kind of teacher over the zoo, parsed and built by NVIDIA's own parser and builder."""

from __future__ import annotations

import pytest

from export.checks.tensorrt import check_tensorrt, installed_tensorrt
from export.graph import Kind, build_teacher_graph, find_logits, prepare
from export.inspect import candidates
from tests.export.graph.test_zoo import SPEC, exported
from tests.export.graph.zoo import SIZE, ZOO

KINDS: tuple[Kind, ...] = ("gradcam", "input_gradient", "gradient_times_input", "eigencam")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_tensorrt_builds(name: str, kind: Kind) -> None:
    tensorrt = installed_tensorrt()
    if tensorrt is None:
        pytest.skip("tensorrt_rtx is not installed")
    _, model = exported(name, False)
    network = prepare(model, SPEC)
    scores = find_logits(network, [info.name for info in model.graph.output])
    tap = candidates(network, scores, SPEC)[-1].tensor
    teacher = build_teacher_graph(model, SPEC, taps={"last": tap}, kind=kind)
    verdict = check_tensorrt(teacher.SerializeToString(), {"images": (4, *SIZE, 3)}, tensorrt)
    assert verdict.accepted, verdict.detail
