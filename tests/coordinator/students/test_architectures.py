from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch.nn import functional as F

from coordinator.config import Architecture
from coordinator.data import LabelledImages
from coordinator.optimisation import Descent, OneCycle
from coordinator.packaging import package_student
from coordinator.student import Student, StudentSpec, accuracy, grad_cam
from coordinator.students.architectures import ARCHITECTURES
from edge_teacher.contract.errors import UsageError
from tests.coordinator.local_teacher import coloured_images

CLASSES = ("a", "b", "c")
IMAGES, LABELS = coloured_images(60, 3, seed=0, size=32)


def test_the_setting_and_the_code_name_the_same() -> None:
    assert set(get_args(Architecture)) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_it_learns_says_where_it_looks_and_survives_int8(name: Architecture) -> None:
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(IMAGES, CLASSES, 8, architecture=name))
    assert student.features == 48
    descent = Descent([student], OneCycle(0.1, 30), 1e-4)
    student.train()
    for _ in range(30):
        descent.step(F.cross_entropy(student(torch.from_numpy(IMAGES)), torch.from_numpy(LABELS)))
    assert accuracy(student.eval(), IMAGES, LABELS) > 0.9
    maps = grad_cam(student, IMAGES)
    assert maps.shape == (60, 4, 4)
    assert (maps.max((1, 2)) == 1).mean() > 0.5
    test = LabelledImages(*coloured_images(60, 3, seed=1, size=32), CLASSES)
    key = Ed25519PrivateKey.generate()
    packaged = package_student(student, name, 1, IMAGES, test, key, largest_drop=0.1)
    assert all(file.agreement > 0.9 for file in packaged.report.files.values())


def test_they_differ_in_size_as_their_names_say() -> None:
    sizes = {
        name: sum(
            p.numel()
            for p in Student(
                StudentSpec.of_images(IMAGES, CLASSES, 24, architecture=name)
            ).parameters()
        )
        for name in get_args(Architecture)
    }
    assert sizes["mobilenet"] < sizes["residual"]
    assert sizes["mobilenet"] < sizes["vgg"]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_images_too_small_to_look_anywhere_are_said(name: Architecture) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UsageError, match=rf"{name}, is one pixel for images of 8x8"):
        Student(StudentSpec.of_images(images, CLASSES, 8, architecture=name))
