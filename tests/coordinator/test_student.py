from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coordinator.student import (
    Student,
    StudentSpec,
    accuracy,
    grad_cam,
    load_student,
    pooled_features,
    predict,
    save_student,
    scale_maps,
)
from edge_teacher.contract.errors import UsageError
from tests.coordinator.local_teacher import coloured_images

IMAGES, LABELS = coloured_images(9, 3, seed=0, size=32)


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(IMAGES, ("a", "b", "c"), 8))
    with torch.no_grad():  # batch norm as after some training, not at its neutral start
        for _ in range(3):
            student(torch.from_numpy(IMAGES))
    return student.eval()


def test_the_spec_normalises_its_images(student: Student) -> None:
    x = student.normalise(torch.from_numpy(IMAGES))
    assert x.shape == (9, 3, 32, 32)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_channel_that_never_varies_does_not_divide_by_zero() -> None:
    spec = StudentSpec.of_images(np.zeros((2, 16, 16, 3), np.uint8), ("a", "b"), 8)
    assert torch.isfinite(Student(spec)(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))).all()


def test_grad_cam_is_the_closed_form_in_float64(student: Student) -> None:
    found = grad_cam(student, IMAGES)
    exact = student.double()
    with torch.no_grad():
        normal = (torch.from_numpy(IMAGES).permute(0, 3, 1, 2).double() - exact.mean) / exact.std
        features = exact.stages(normal)
        top = exact.classify(features).argmax(1)
        # For a global mean and a linear head, alpha is the top class's weight over the pixels.
        weight = exact.head().weight[top][:, :, None, None] / features[0, 0].numel()
        expected = scale_maps(F.relu((weight * features).sum(1)))
    assert found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert found.min() >= 0
    assert found.max() == 1


def test_a_flat_map_is_all_zeros() -> None:
    maps = torch.stack([torch.full((3, 3), 0.7), torch.arange(9.0).view(3, 3)])
    scaled = scale_maps(maps)
    assert (scaled[0] == 0).all()
    assert scaled[1].min() == 0
    assert scaled[1].max() == 1


def test_looking_does_not_change_the_student(student: Student) -> None:
    student.train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    grad_cam(student, IMAGES)
    predict(student, IMAGES)
    pooled_features(student, IMAGES)
    assert student.training
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_accuracy_counts_top_1(student: Student) -> None:
    guess = predict(student, IMAGES).argmax(1)
    assert accuracy(student, IMAGES, guess) == 1.0
    assert accuracy(student, IMAGES, (guess + 1) % 3) == 0.0
    logits = student.head()(pooled_features(student, IMAGES)).detach().numpy()
    assert np.allclose(logits, predict(student, IMAGES), atol=1e-5)


def test_a_student_survives_its_file(student: Student, tmp_path: Path) -> None:
    save_student(student, tmp_path / "new" / "student.pt")
    loaded = load_student(tmp_path / "new" / "student.pt")
    assert loaded.spec == student.spec
    assert not loaded.training
    assert np.array_equal(predict(loaded, IMAGES), predict(student, IMAGES))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["student.pt"]


def test_a_file_that_is_no_student_is_said(student: Student, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_student(tmp_path / "student.pt")
    save_student(student, tmp_path / "student.pt")
    whole = (tmp_path / "student.pt").read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        (tmp_path / "student.pt").write_bytes(content)
        with pytest.raises(UsageError, match="is not a student"):
            load_student(tmp_path / "student.pt")
    torch.save({"other": 1}, tmp_path / "student.pt")
    with pytest.raises(UsageError, match="is not a student"):
        load_student(tmp_path / "student.pt")
