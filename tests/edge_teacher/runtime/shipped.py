"""The shipped teachers and the test graphs: everything a runtime has to take."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx

from edge_teacher import bundle as bundles
from edge_teacher.keys import read_public
from export.checks.fp16 import to_half
from tests.edge_teacher.nets import student_graph, teacher_graph

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TEACHERS = tuple(sorted((EXAMPLES / "teachers").glob("*.fedsa")))
GRAPHS = (*(path.stem for path in TEACHERS), "tiny teacher", "tiny student")


@cache
def graph(name: str) -> tuple[bytes, tuple[int, int]]:
    """(ONNX file, the size (height, width) it works at)."""
    if name == "tiny teacher":
        return teacher_graph(), (8, 8)
    if name == "tiny student":
        return student_graph(), (8, 8)
    (path,) = [path for path in TEACHERS if path.stem == name]
    bundle = bundles.read(path, [read_public(path.with_name("owner.pub"))])
    assert isinstance(bundle.card, bundles.TeacherCard)
    return bundle.file(bundle.card.graph), bundle.card.teacher.input_size


@cache
def half_of(name: str) -> bytes:
    """The copy in half precision, as an export makes it."""
    return to_half(onnx.load_from_string(graph(name)[0])).SerializeToString()
