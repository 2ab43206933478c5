"""What the selected teachers say about the images the student trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.amalgamation.hints import maps_scale, signed_root
from coordinator.answers.checks import check_answer, check_saliency
from edge_teacher.contract.errors import CheckFailed

_BLOCK = 256


@dataclass(frozen=True)
class TeacherAnswers:
    """One teacher's features of the probe and the transfer images, in the order of the images.

    pooled_probe [P, C] and pooled_transfer [U, C] are signed roots, float32. maps_transfer
    [U, C, h, w] is of unit scale, and float16 because it is the one thing here that can be large;
    None if not asked for. maps_probe [P, C, h, w] is divided by the same number. looks [U + P, S, S],
    float16, are saliency maps of the transfer, then the probe images, each divided by its maximum; None if
    not asked for.
    """

    pooled_probe: Tensor
    pooled_transfer: Tensor
    maps_transfer: Tensor | None
    maps_probe: Tensor | None = None
    looks: Tensor | None = None


class Sight(Protocol):
    """As much of a `Teacher` as is asked here. The student has it too."""

    @property
    def name(self) -> str: ...

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False
    ) -> NDArray[np.float32]: ...

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...


def ask(
    teacher: Sight,
    probe: NDArray[np.uint8],
    transfer: NDArray[np.uint8],
    *,
    flips: bool,
    maps: bool,
    probe_maps: bool = False,
) -> TeacherAnswers:
    """Query a teacher for images uint8[N, H, W, 3].

    With `flips` a pooled feature is the mean of the image's and its mirror image's: twice the
    queries, and features with less in them that does not matter. `probe_maps`, of which `maps` are the
    scale, come with `maps` only. Raises CheckFailed if an answer
    has the wrong shape or is not finite.
    """
    pooled = _pooled(teacher, probe, flips), _pooled(teacher, transfer, flips)
    _require_same(teacher, *pooled, "pooled features")
    if not maps:
        return TeacherAnswers(*pooled, None)
    of_transfer = _maps(teacher, transfer)
    scale = maps_scale(of_transfer)
    of_probe = _maps(teacher, probe) if probe_maps else None
    if of_probe is not None:
        _require_same(teacher, of_probe, of_transfer, "feature maps")
        of_probe = _halved(of_probe, scale)
    return TeacherAnswers(*pooled, _halved(of_transfer, scale), of_probe)


def _halved(maps: Tensor, scale: Tensor) -> Tensor:
    """maps / scale as float16: scaled first, so no teacher's values can leave its range.

    By blocks, for a second copy of all of them in float32 may be more than there is room for.
    """
    halved = torch.empty(maps.shape, dtype=torch.float16)
    for start in range(0, len(maps), _BLOCK):
        halved[start : start + _BLOCK] = maps[start : start + _BLOCK] / scale
    return halved


def _pooled(teacher: Sight, images: NDArray[np.uint8], flips: bool) -> Tensor:
    return signed_root(torch.from_numpy(ask_pooled(teacher, images, flips=flips)))


def ask_pooled(teacher: Sight, images: NDArray[np.uint8], *, flips: bool) -> NDArray[np.float32]:
    """The pooled features of images uint8[N, H, W, 3], float32[N, C], as `ask` has them asked for."""
    what = "pooled features"
    pooled = check_answer(teacher.name, teacher.pooled(images), len(images), 2, what)
    if flips:
        mirrored = teacher.pooled(images, mirrored=True)
        other = check_answer(teacher.name, mirrored, len(images), 2, what)
        _require_same(teacher, pooled, other, what)
        pooled = ((pooled + other) / 2).astype(np.float32)
    return pooled


class Looking(Protocol):
    """As much of a `Teacher` as is asked where it looks, and what it sees there."""

    @property
    def name(self) -> str: ...

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...

    def attended(
        self, images: NDArray[np.uint8], attention: NDArray[np.float32]
    ) -> NDArray[np.float32]: ...


def ask_attended(
    teacher: Looking, images: NDArray[np.uint8], maps: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The features of images uint8[N, H, W, 3] pooled under maps [N, S, S], float32[N, C]."""
    answer = teacher.attended(images, maps)
    return check_answer(teacher.name, answer, len(images), 2, "features under its saliency")


def ask_looks(teacher: Looking, probe: NDArray[np.uint8], transfer: NDArray[np.uint8]) -> Tensor:
    """`TeacherAnswers.looks`. Raises CheckFailed for maps that are none, or all flat."""
    images = np.concatenate([transfer, probe])
    maps = check_saliency(teacher.name, teacher.saliency(images), len(images))
    greatest = maps.max((1, 2), keepdims=True)
    # Of unit scale first, for which no cosine cares: a teacher's own may leave the range of float16.
    scaled = np.divide(maps, greatest, out=np.zeros_like(maps), where=greatest > 0)
    return torch.from_numpy(scaled).half()


def _maps(teacher: Sight, images: NDArray[np.uint8]) -> Tensor:
    answer = check_answer(teacher.name, teacher.features(images), len(images), 4, "feature maps")
    return torch.from_numpy(answer)


def _require_same(
    teacher: Sight,
    one: NDArray[np.float32] | Tensor,
    other: NDArray[np.float32] | Tensor,
    what: str,
) -> None:
    """Of every image the same shape. Raises CheckFailed."""
    if one.shape[1:] != other.shape[1:]:
        raise CheckFailed(
            f"{teacher.name} answered with {list(one.shape[1:])} {what} for some images and "
            f"{list(other.shape[1:])} for others."
        )
