"""Teachers of the table that answer in this process, and count what they would have been asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.example_networks import ExampleNetwork, example_bundles
from coordinator.answers import Question, RememberedAnswers, image_keys
from coordinator.student import Student, grad_cam, load_student

_BATCH = 500


class LocalTeacher:
    """A network of `paper_teachers` as a `Teacher`.

    `queries` counts the images it was asked about, once for each question; `wire_bytes` what the
    answers (float16) and the images (once) are in bytes, were it a device. Answers are remembered in
    `cache` for other runs; that changes no count.
    """

    def __init__(self, path: Path, cache: RememberedAnswers) -> None:
        self.name = f"teacher-{path.stem}"
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self._cache = cache
        self._sent: set[bytes] = set()
        self.queries = 0
        self.wire_bytes = 0
        self._load(path)

    def _load(self, path: Path) -> None:
        self.net: Student = load_student(path)

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._told(images, grad_cam(self.net, images))

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        what = "mirrored" if mirrored else "pooled"
        seen = np.ascontiguousarray(images[:, :, ::-1]) if mirrored else images
        return self._told(images, self._known(images, what, lambda: self._pooled(seen)))

    def attended(
        self,
        images: NDArray[np.uint8],
        attention: NDArray[np.float32],
        *,
        tap: str | None = None,
    ) -> NDArray[np.float32]:
        def pool(maps: Tensor, where: slice) -> Tensor:
            asked = torch.from_numpy(attention[where])[:, None]
            weights = torch.nn.functional.interpolate(
                asked, list(maps.shape[2:]), mode="bilinear", align_corners=False
            )
            total = weights.sum((2, 3))
            mean = (maps * weights).sum((2, 3)) / total.clamp_min(1e-9)
            return torch.where(total > 0, mean, maps.mean((2, 3)))

        return self._told(images, self._reduced(images, pool))

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._told(images, self._reduced(images, lambda maps, _: maps))

    def _pooled(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._reduced(images, lambda maps, _: maps.mean((2, 3)))

    @torch.no_grad()
    def _reduced(
        self, images: NDArray[np.uint8], reduce: Callable[[Tensor, slice], Tensor]
    ) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(images), _BATCH):
            where = slice(start, start + _BATCH)
            found.append(reduce(self._maps(images[where]), where).numpy())
        return np.concatenate(found)

    def _maps(self, images: NDArray[np.uint8]) -> Tensor:
        return self.net.feature_map(torch.from_numpy(images))

    def _known(
        self, images: NDArray[np.uint8], what: str, compute: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        question = Question(
            bundle=self.identity, method=what, query="", image_size=images.shape[1:3]
        )
        keys = image_keys(images)
        known = self._cache.known(question, self.name, keys)
        if known is not None and known.rows.all():
            return known.answers.astype(np.float32)
        answers = compute().astype(np.float16)
        missing = np.ones(len(keys), bool) if known is None else ~known.rows
        self._cache.remember(question, self.name, keys[missing], answers[missing])
        return answers.astype(np.float32)

    def _told(self, images: NDArray[np.uint8], answer: NDArray[np.float32]) -> NDArray[np.float32]:
        self.queries += len(images)
        self.wire_bytes += 2 * answer.size
        digest = hashlib.sha256(images.tobytes()).digest()
        if digest not in self._sent:
            self._sent.add(digest)
            self.wire_bytes += images.nbytes
        return answer


class LogitsTeacher(LocalTeacher):
    """Tells its class scores and nothing else (FedMD, Li and Wang 2019)."""

    def _reduced(
        self, images: NDArray[np.uint8], reduce: Callable[[Tensor, slice], Tensor]
    ) -> NDArray[np.float32]:
        return super()._reduced(images, lambda maps, _: self.net.classify(maps))

    def _known(
        self, images: NDArray[np.uint8], what: str, compute: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        return super()._known(images, f"logits {what}", compute)


class BundleTeacher(LocalTeacher):
    """The network of a bundle in examples/teachers, as a device runs it."""

    def _load(self, path: Path) -> None:
        self._network = ExampleNetwork(path)

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
        found = [self._network.run(part, "saliency")[0] for part in parts]
        return self._told(images, np.concatenate(found))

    def _maps(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(self._network.run(images, "features.last")[0])


def mixed_teachers(cache: RememberedAnswers) -> list[LocalTeacher]:
    """Eight of three architectures."""
    return [BundleTeacher(path, cache) for path in example_bundles()]
