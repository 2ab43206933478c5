"""Saliency maps as small transparent pictures to lay over a photograph, and words for who cannot see them."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL = 96
"""Pixels of one picture's side on the page."""

# matplotlib's "inferno" (Smith and van der Walt, CC0) at every tenth: perceptually uniform, so equal
# steps of saliency look equal, also in grey.
_INFERNO = np.array(
    [
        (0.001, 0.000, 0.014),
        (0.088, 0.045, 0.226),
        (0.258, 0.039, 0.406),
        (0.416, 0.090, 0.433),
        (0.578, 0.148, 0.404),
        (0.736, 0.216, 0.330),
        (0.865, 0.317, 0.226),
        (0.955, 0.470, 0.100),
        (0.988, 0.645, 0.040),
        (0.964, 0.844, 0.273),
        (0.988, 0.998, 0.645),
    ]
)
_LEVELS = 32
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")


def inferno(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """values [...] in [0, 1] -> colours uint8[..., 3]."""
    position = np.clip(values, 0, 1) * (len(_INFERNO) - 1)
    channels = [np.interp(position, np.arange(len(_INFERNO)), c) for c in _INFERNO.T]
    colours: NDArray[np.uint8] = np.round(np.stack(channels, -1) * 255).astype(np.uint8)
    return colours


def photograph_uri(image: NDArray[np.uint8]) -> str:
    """uint8[H, W, 3] as a PNG data URI, no larger than a retina cell needs."""
    picture = Image.fromarray(image)
    picture.thumbnail((2 * CELL, 2 * CELL))
    return _png_uri(picture)


def heat_uri(saliency: NDArray[np.float32]) -> str:
    """A map [S, S] in [0, 1] as a transparent PNG data URI: what is looked at shines, the rest dims.

    Enlarged bilinearly before it is coloured, so that the colours between two cells are the map's and
    not a mixture. A palette of 32 levels keeps a picture near 2 kB.
    """
    smooth = Image.fromarray(np.clip(saliency, 0, 1).astype(np.float32)).resize(
        (CELL, CELL), Image.Resampling.BILINEAR
    )
    levels = np.round(np.asarray(smooth) * (_LEVELS - 1)).astype(np.uint8)
    picture = Image.fromarray(levels, mode=None).convert("P")
    ramp = np.linspace(0, 1, _LEVELS)
    picture.putpalette(inferno(ramp).tobytes())
    # Dark veil where nothing is looked at, clear at the shoulder, glowing at the peak.
    alpha = np.interp(ramp, (0, 0.35, 1), (0.58, 0.32, 0.7))
    return _png_uri(picture, transparency=np.round(alpha * 255).astype(np.uint8).tobytes())


def describe(saliency: NDArray[np.float32]) -> str:
    """Where a map [S, S] is strongest, in words: "top left", "centre", "nowhere" if it is flat."""
    if saliency.max() <= saliency.min():
        return "nowhere"
    row, column = np.unravel_index(int(saliency.argmax()), saliency.shape)
    vertical = _ROWS[int((row + 0.5) * 3 // saliency.shape[0])]
    horizontal = _COLUMNS[int((column + 0.5) * 3 // saliency.shape[1])]
    return (
        "centre" if (vertical, horizontal) == ("middle", "centre") else f"{vertical} {horizontal}"
    )


def legend_uri() -> str:
    """The colour map from 0 to 1 as a strip."""
    return _png_uri(Image.fromarray(inferno(np.linspace(0, 1, 128)[None].repeat(8, axis=0))))


def _png_uri(picture: Image.Image, **options: bytes) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
