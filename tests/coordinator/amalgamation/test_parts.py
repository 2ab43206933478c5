"""Translators, hints and teachers' answers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coordinator.amalgamation.answers import ask
from coordinator.amalgamation.hints import (
    map_hint,
    pooled_hint,
    signed_root,
    standardise,
    unit_scale_maps,
)
from coordinator.amalgamation.translators import MapTranslator, PooledTranslator
from edge_teacher.contract.errors import CheckFailed
from tests.coordinator.local_teacher import coloured_images, random_teacher

IMAGES, _ = coloured_images(6, 3, seed=0)


def test_a_map_translator_is_three_pointwise_layers() -> None:
    translator = MapTranslator(8, 12)
    kinds = [type(layer) for layer in translator]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3
    assert all(m.kernel_size == (1, 1) for m in translator if isinstance(m, nn.Conv2d))
    assert all(m.negative_slope == 0.1 for m in translator if isinstance(m, nn.LeakyReLU))
    assert translator(torch.zeros(2, 8, 5, 5)).shape == (2, 12, 5, 5)


def test_hints_are_mean_squares() -> None:
    student, teacher = torch.rand(4, 8), torch.rand(4, 12)
    translator = PooledTranslator(8, 12)
    expected = (student @ translator.weight.T + translator.bias - teacher).square().mean()
    assert torch.isclose(pooled_hint(translator, student, teacher), expected)
    maps = torch.rand(4, 8, 5, 5)
    assert map_hint(nn.Identity(), maps, maps) == 0
    assert map_hint(nn.Identity(), maps, maps + 2).item() == pytest.approx(4)


def test_the_student_map_is_brought_to_the_teacher_size() -> None:
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 6, 6)
    resized = F.interpolate(student, (6, 6), mode="bilinear", align_corners=False)
    assert torch.isclose(map_hint(nn.Identity(), student, teacher), F.mse_loss(resized, teacher))


def test_scales_are_brought_to_one_and_dead_channels_survive() -> None:
    maps = torch.rand(3, 2, 4, 4) * 1000
    assert unit_scale_maps(maps).square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    assert (unit_scale_maps(torch.zeros(1, 2, 3, 3)) == 0).all()
    pooled = torch.rand(50, 3) * torch.tensor([1.0, 100.0, 0.0])
    mean, deviation = standardise(pooled)
    standard = (pooled - mean) / deviation
    assert torch.isfinite(standard).all()
    assert standard[:, :2].std(0, correction=0).tolist() == pytest.approx([1, 1], abs=1e-4)


def test_roots_keep_the_sign() -> None:
    assert signed_root(torch.tensor([-4.0, 0.0, 9.0])).tolist() == [-2, 0, 3]


def test_flips_average_an_image_and_its_mirror() -> None:
    teacher = random_teacher("t", 0)
    plain = ask(teacher, IMAGES[:2], IMAGES, flips=False, maps=False)
    assert teacher.asked == {"saliency": 0, "pooled": 8, "attended": 0, "features": 0}
    both = ask(teacher, IMAGES[:2], IMAGES, flips=True, maps=True)
    assert teacher.asked == {"saliency": 0, "pooled": 24, "attended": 0, "features": 6}
    straight = torch.from_numpy(teacher.pooled(IMAGES))
    mirrored = torch.from_numpy(teacher.pooled(np.ascontiguousarray(IMAGES[:, :, ::-1])))
    assert plain.maps_transfer is None
    assert torch.allclose(plain.pooled_transfer, straight.sqrt())
    assert torch.allclose(both.pooled_transfer, ((straight + mirrored) / 2).sqrt())
    assert both.pooled_probe.shape == (2, 12)
    assert both.maps_transfer is not None
    assert both.maps_transfer.shape == (6, 12, 4, 4)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (np.zeros((5, 12), np.float32), r"t answered 6 images with .* \[5, 12\]"),
        (np.zeros((6, 12, 1), np.float32), "2 dimensions"),
        (np.full((6, 12), np.nan, np.float32), "not finite"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(answer: np.ndarray, says: str) -> None:
    teacher = random_teacher("t", 0)
    teacher.pooled = lambda images: answer  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match=says):
        ask(teacher, IMAGES, IMAGES, flips=False, maps=False)
