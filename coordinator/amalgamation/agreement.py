"""Blind spots: a teacher that looks elsewhere than the student on an image teaches it less of that image.

From s_i(x) = 1/2 + 1/2 cos(M_S(x), M_i(x)), the similarity that the paper selects by (Xie et al. 2022):

    a_i(x) = 2 s_i(x) - 1                      the cosine: 0 where the maps nowhere overlap
    hint_i = mean_x a_i(x) / mean(a_i) ||R_i(F_S(x)) - F_i(x)||^2

The weights of one teacher have the mean 1 over the images, so that what it counts beside the others is
still the selection's to say. A teacher's flat map is a blind spot: a_i(x) = 0. Where the student's own map
is flat nothing is known of anybody, and a_i(x) is the teacher's mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.amalgamation.answers import TeacherAnswers
from coordinator.answers.checks import flat_maps
from coordinator.data import SeveralTasks
from coordinator.selection import similarities
from coordinator.student import Student, grad_cam

_BLOCK = 512
_LEAST = 1e-6


def agreements(
    student: Student,
    data: SeveralTasks,
    answers: Mapping[str, TeacherAnswers],
    selected: Mapping[str, Mapping[str, float]],
    teachers: Iterable[str],
) -> dict[str, Tensor]:
    """Of each teacher: its weight on every transfer and probe image, float32[images], of mean 1.

    `selected` has for each task the teachers selected for it. With several tasks the student looks
    elsewhere for each: a teacher's a_i(x) is the mean over the tasks that selected it, by their weights.
    `answers` must have `looks`.
    """
    images = np.concatenate([data.transfer, data.probe_images])
    looks = {name: grad_cam(student, images, name) for name in data.tasks}
    found = {}
    for teacher in teachers:
        maps = answers[teacher].looks
        if maps is None:
            raise ValueError(f"{teacher} was not asked where it looks")
        mine = {name: t.weight for name, t in data.tasks.items() if teacher in selected[name]}
        each = sum(weight * _agreement(looks[name], maps) for name, weight in mine.items())
        found[teacher] = torch.from_numpy(_of_mean_1(np.asarray(each)))
    return found


def _agreement(student: NDArray[np.float32], teacher: Tensor) -> NDArray[np.float64]:
    """a_i(x) of every image, [N] in [0, 1]."""
    size = (
        max(student.shape[1], teacher.shape[1]),
        max(student.shape[2], teacher.shape[2]),
    )
    found = np.empty(len(student))
    unknown = flat_maps(student)
    # By blocks: maps of all images, brought to one size in double, may be more than there is room for.
    for start in range(0, len(student), _BLOCK):
        rows = slice(start, start + _BLOCK)
        maps = teacher[rows].float().numpy()
        found[rows] = 2 * similarities(student[rows], maps, size) - 1
        found[rows][flat_maps(maps)] = 0
    if unknown.any():
        found[unknown] = found[~unknown].mean() if not unknown.all() else 1.0
    return found


def _of_mean_1(each: NDArray[np.float64]) -> NDArray[np.float32]:
    """A teacher that agrees on no image at all was selected for something else: all count the same."""
    mean = float(each.mean())
    scaled = each / mean if mean > _LEAST else np.ones_like(each)
    return scaled.astype(np.float32)
