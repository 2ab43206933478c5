from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coordinator.amalgamation.agreement import agreements
from coordinator.amalgamation.answers import TeacherAnswers, ask, ask_looks
from coordinator.amalgamation.hints import map_hint, pooled_hint
from coordinator.data import SINGLE, LabelledImages, SeveralTasks, TaskData, as_several
from coordinator.selection import similarities
from coordinator.student import HeadSpec, Student, StudentSpec, grad_cam
from edge_teacher.contract.errors import CheckFailed
from tests.coordinator.liars import Liar
from tests.coordinator.local_teacher import LocalTeacher, coloured_images, random_teacher

CLASSES = ("a", "b", "c")
DATA = TaskData(
    LabelledImages(*coloured_images(12, 3, seed=0), CLASSES), coloured_images(36, 3, seed=1)[0]
)
IMAGES = np.concatenate([DATA.transfer, DATA.probe.images])


def student(classes: tuple[str, ...] = CLASSES) -> Student:
    torch.manual_seed(0)
    return Student(StudentSpec.of_images(DATA.transfer, classes, 8)).eval()


def answers(looks: np.ndarray) -> TeacherAnswers:
    asked = ask(random_teacher("t", 1), DATA.probe.images, DATA.transfer, flips=False, maps=False)
    return replace(asked, looks=torch.from_numpy(looks).half())


def each(looks: np.ndarray, net: Student | None = None) -> np.ndarray:
    found = agreements(
        net or student(), as_several(DATA), {"t": answers(looks)}, {SINGLE: {"t": 1.0}}, ["t"]
    )
    return found["t"].numpy()


def test_an_image_counts_as_far_as_the_teacher_looks_where_the_student_does() -> None:
    looks = random_teacher("t", 1).saliency(IMAGES)
    found = each(looks)
    maps = grad_cam(student(), IMAGES)
    size = (max(maps.shape[1], looks.shape[1]), max(maps.shape[2], looks.shape[2]))
    sent = looks.astype(np.float16).astype(np.float32)
    cosine = 2 * similarities(maps, sent, size) - 1
    known = maps.any((1, 2))
    assert 5 < known.sum() < len(known)
    assert found[known] == pytest.approx(cosine[known] / cosine[known].mean(), rel=1e-5)
    assert found[~known] == pytest.approx(1)
    assert found[known].std() > 0.01


def test_a_flat_map_of_the_teacher_is_a_blind_spot() -> None:
    looks = random_teacher("t", 1).saliency(IMAGES)
    seeing = np.flatnonzero(grad_cam(student(), IMAGES).any((1, 2)))
    looks[seeing[0]], looks[seeing[1]] = 0.0, 0.7
    found = each(looks)
    assert found[seeing[0]] == found[seeing[1]] == 0
    assert found.mean() == pytest.approx(1)


def test_where_the_student_looks_nowhere_a_teacher_counts_as_on_average() -> None:
    net = student()
    with torch.no_grad():
        for parameter in net.head().parameters():
            parameter.zero_()
    looks = random_teacher("t", 1).saliency(IMAGES)
    assert each(looks, net) == pytest.approx(1)


def test_one_that_agrees_nowhere_still_teaches() -> None:
    assert each(np.zeros((len(IMAGES), 4, 4), np.float32)) == pytest.approx(1)


def test_with_several_tasks_those_count_that_selected_the_teacher() -> None:
    two = LabelledImages(*coloured_images(12, 2, seed=4), ("x", "y"))
    data = SeveralTasks.of(
        {"three": DATA, "two": TaskData(two, DATA.transfer)}, {"three": 2.0, "two": 1.0}
    )
    spec = StudentSpec.of_images(
        DATA.transfer,
        {n: head_of(t.classes) for n, t in data.tasks.items()},
        8,
    )
    torch.manual_seed(0)
    net = Student(spec).eval()
    images = np.concatenate([data.transfer, data.probe_images])
    teacher = random_teacher("t", 1)
    given = {"t": replace(answers(teacher.saliency(images)))}
    one, both = (
        agreements(net, data, given, selected, ["t"])["t"].numpy()
        for selected in (
            {"three": {"t": 1.0}, "two": {}},
            {"three": {"t": 1.0}, "two": {"t": 1.0}},
        )
    )
    assert one.mean() == pytest.approx(1)
    assert both.mean() == pytest.approx(1)
    assert not np.allclose(one, both)


def head_of(classes: tuple[str, ...]) -> HeadSpec:

    return HeadSpec("single-label", classes)


def test_hints_are_weighed_by_image() -> None:
    torch.manual_seed(0)
    same = torch.nn.Identity()
    weights = torch.tensor([0.0, 1.0, 2.0])
    pooled, target = torch.randn(3, 5), torch.randn(3, 5)
    by_image = [float(F.mse_loss(a, b)) for a, b in zip(pooled, target, strict=True)]
    expected = (by_image[1] + 2 * by_image[2]) / 3
    assert float(pooled_hint(same, pooled, target, weights)) == pytest.approx(expected)
    maps, others = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    by_image = [float(F.mse_loss(a, b)) for a, b in zip(maps, others, strict=True)]
    expected = (by_image[1] + 2 * by_image[2]) / 3
    assert float(map_hint(same, maps, others, weights)) == pytest.approx(expected)
    ones = torch.ones(3)
    assert float(pooled_hint(same, pooled, target, ones)) == pytest.approx(
        float(pooled_hint(same, pooled, target))
    )


def test_where_a_teacher_looks_is_checked() -> None:
    liar = Liar("liar", 1, "saliency", lambda maps: np.full_like(maps, np.nan))
    with pytest.raises(CheckFailed, match="not finite"):
        ask_looks(liar, DATA.probe.images, DATA.transfer)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_agreement_does_not_depend_on_the_scale_a_teacher_sends_its_maps_in(scale: float) -> None:
    class Wild(LocalTeacher):
        def saliency(self, images: np.ndarray) -> np.ndarray:
            maps = super().saliency(images)
            maps[0] = 0
            return maps * np.float32(scale)

    made = random_teacher("t", 1)
    wild = ask_looks(Wild("t", made.stages, made.head), DATA.probe.images, DATA.transfer)
    plain = ask_looks(made, DATA.probe.images, DATA.transfer)
    assert not wild[0].any()
    assert torch.allclose(wild[1:], plain[1:], atol=1e-3)
    assert plain.amax() == 1
