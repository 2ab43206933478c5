import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from coordinator.augmentation import Jitter, with_views


def jitter(flip: bool, down: int, right: int) -> Jitter:
    return Jitter(torch.tensor([flip]), torch.tensor([[down, right]]))


def test_an_image_is_shifted_mirrored_at_its_border_then_flipped() -> None:
    image = torch.arange(5, dtype=torch.uint8).view(1, 1, 5, 1).expand(1, 3, 5, 3)
    assert jitter(False, 0, 0).images(image)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert jitter(False, 0, 2).images(image)[0, 0, :, 0].tolist() == [2, 1, 0, 1, 2]
    assert jitter(False, 0, -2).images(image)[0, 0, :, 0].tolist() == [2, 3, 4, 3, 2]
    assert jitter(True, 0, 0).images(image)[0, 0, :, 0].tolist() == [4, 3, 2, 1, 0]
    assert jitter(True, 0, 2).images(image)[0, 0, :, 0].tolist() == [2, 1, 0, 1, 2]
    assert jitter(True, 0, 1).images(image)[0, 0, :, 0].tolist() == [3, 2, 1, 0, 1]


@given(st.booleans(), st.integers(-1, 1), st.integers(-1, 1))
def test_maps_move_as_their_images_do(flip: bool, down: int, right: int) -> None:
    # A map of one cell per 4x4 pixels, and an image painted with it, shifted by whole cells.
    cells = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    image = (F.interpolate(cells, scale_factor=4) * 255).to(torch.uint8)
    moved = jitter(flip, 4 * down, 4 * right)
    seen = moved.images(image.permute(0, 2, 3, 1))[..., 0].float()
    expected = F.avg_pool2d(seen[:, None], 4) / 255
    found = moved.maps(cells, 24, 24)
    # Inside, where no mirrored border comes in.
    assert (found - expected)[:, :, 1:-1, 1:-1].abs().max() < 0.01


def test_draws_stay_in_range_and_repeat() -> None:
    first, again = (Jitter.draw(500, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.flips, again.flips)
    assert torch.equal(first.shifts, again.shifts)
    assert first.shifts.min() == -3
    assert first.shifts.max() == 3
    assert 0.4 < first.flips.float().mean() < 0.6
    assert torch.equal(first.rows(torch.tensor([4, 2])).shifts, first.shifts[[4, 2]])


def test_views_come_behind_the_images_and_are_always_the_same() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    every = with_views(images, 2, 2, torch.Generator().manual_seed(3))
    assert every.shape == (15, 8, 8, 3)
    assert (every[:5] == images).all()
    assert (every[5:10] != images).any()
    assert (every[5:10] != every[10:]).any()
    assert (every == with_views(images, 2, 2, torch.Generator().manual_seed(3))).all()
    # A view has no pixel that its image has not.
    assert set(every[7].reshape(-1, 3).tobytes()) <= set(images[2].tobytes())
