"""What a student's bundle says about its accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.data import LabelledImages
from coordinator.packaging import package_student
from coordinator.student import Student, StudentSpec, predict
from edge_teacher.contract.errors import UsageError
from tests.coordinator.local_teacher import coloured_images

IMAGES, _ = coloured_images(24, 3, seed=0, size=32)
CLASSES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(IMAGES, CLASSES, 8))
    with torch.no_grad():
        student(torch.from_numpy(IMAGES))
    return student.eval()


def accuracy(student: Student, holdout: LabelledImages) -> float | None:
    packaged = package_student(
        student, "t", 1, IMAGES, holdout, Ed25519PrivateKey.generate(), largest_drop=1.0
    )
    return packaged.report.files["student.fp32.onnx"].accuracy


def test_labels_of_a_holdout_are_matched_by_name(student: Student) -> None:
    right = predict(student, IMAGES).argmax(1)
    # The same labels under another numbering, and without a class nobody is.
    names = sorted({CLASSES[i] for i in right}, reverse=True)
    labels = np.array([names.index(CLASSES[i]) for i in right], dtype=np.int64)
    assert accuracy(student, LabelledImages(IMAGES, labels, tuple(names))) == 1.0


def test_a_class_the_student_does_not_know_is_said(student: Student) -> None:
    holdout = LabelledImages(IMAGES, np.zeros(len(IMAGES), np.int64), ("wolf",))
    with pytest.raises(UsageError, match=r"has the class wolf.* it knows cat, dog, fox"):
        accuracy(student, holdout)
