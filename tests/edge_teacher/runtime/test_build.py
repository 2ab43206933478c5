"""The builder's code over NVIDIA's real parser and builder, which need no GPU: TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cut import cut, outputs_of
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.tensorrt.build import Phases, build
from edge_teacher.runtime.tensorrt.key import Options, profile_for
from export.checks.tensorrt import installed_tensorrt
from tests.edge_teacher.runtime.shipped import GRAPHS, TEACHERS, graph, half_of

OPTIONS = Options(level=0)
pytestmark = pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")


@pytest.fixture
def rtx() -> ModuleType:
    module = installed_tensorrt()
    if module is None:
        pytest.skip("tensorrt_rtx is not installed")
    return module


@pytest.mark.parametrize("name", GRAPHS)
def test_every_shipped_graph_and_every_part_of_it_is_built(rtx: ModuleType, name: str) -> None:
    whole, size = graph(name)
    parts = {output: cut(whole, [output]) for output in outputs_of(whole)}
    for what, file in {"whole": whole, **parts}.items():
        built = build(rtx, file, profile=profile_for(size), options=OPTIONS, name=f"{name} {what}")
        assert len(built.engine) > 1000
        assert built.timing
        assert built.seconds > 0


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_the_copy_in_half_precision_of_every_shipped_teacher_is_built(
    rtx: ModuleType, path: Path
) -> None:
    _, size = graph(path.stem)
    half = half_of(path.stem)
    for file in (half, cut(half, ["features.last"])):
        assert build(rtx, file, profile=profile_for(size), options=OPTIONS).engine


def test_progress_goes_forward_and_ends_at_one(rtx: ModuleType) -> None:
    file, size = graph("tiny teacher")
    told: list[float] = []
    watch = Watch(progress=told.append)
    build(rtx, file, profile=profile_for(size), options=OPTIONS, watch=watch)
    assert len(told) > 3
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_build_ends_when_it_is_cancelled(rtx: ModuleType) -> None:
    file, size = graph("tiny teacher")
    watch = Watch(progress=lambda share: watch.cancelled.set() if share > 0.1 else None)
    with pytest.raises(CheckFailed, match="the build of the graph was cancelled"):
        build(rtx, file, profile=profile_for(size), options=OPTIONS, watch=watch)


def test_timings_of_an_earlier_build_are_taken_and_those_of_another_kind_left(
    rtx: ModuleType,
) -> None:
    file, size = graph("tiny teacher")
    first = build(rtx, file, profile=profile_for(size), options=OPTIONS)
    again = build(rtx, file, profile=profile_for(size), options=OPTIONS, timing=first.timing)
    assert again.engine
    other = build(rtx, file, profile=profile_for(size), options=OPTIONS, timing=b"of another kind")
    assert other.engine


def test_what_the_parser_refuses_is_refused_in_its_own_words(rtx: ModuleType) -> None:
    from onnx import TensorProto, helper

    made = helper.make_graph(
        [helper.make_node("NonZero", ["images"], ["found"], domain="nobody")],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info("found", TensorProto.INT64, None)],
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("nobody", 1)],
        ir_version=9,
    )
    with pytest.raises(
        CheckFailed, match=r"the parser of tensorrt_rtx 1\.\S+ refuses mine: .*NonZ"
    ):
        build(
            rtx,
            model.SerializeToString(),
            profile=profile_for((8, 8)),
            options=OPTIONS,
            name="mine",
        )
    with pytest.raises(CheckFailed, match="takes nothing, and must take images"):
        build(rtx, b"", profile=profile_for((8, 8)), options=OPTIONS)


def test_phases_inside_phases_are_one_share() -> None:
    told: list[float] = []
    phases = Phases(Watch(progress=told.append))
    phases.start("engine", None, 2)
    phases.step("engine", 0)
    phases.start("tactics", "engine", 4)
    assert phases.step("tactics", 1)
    phases.finish("tactics")
    phases.start("engine again", None, 10)
    phases.step("engine again", 0)  # less than what was told: nothing is told
    assert told == [0.5, 0.75]


@pytest.mark.parametrize(
    ("size", "most"), [((32, 32), (128, 128)), ((224, 224), (448, 448)), ((640, 480), (640, 480))]
)
def test_the_largest_input_is_bounded(size: tuple[int, int], most: tuple[int, int]) -> None:
    profile = profile_for(size)
    assert profile.most == (32, *most, 3)
    assert profile.fits(*size)
    assert profile.fits(*most)
    assert not profile.fits(most[0] + 1, most[1])
    assert not profile.fits(size[0] // 8 - 1, size[1])
