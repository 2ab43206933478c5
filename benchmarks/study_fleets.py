"""The two fleets of the selection study: eight alike, and the examples' eight of three architectures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.example_networks import ExampleNetwork, example_bundles
from benchmarks.paper_local import LocalTeacher
from benchmarks.paper_teachers import COUNT, path_of
from coordinator.answers import Question, RememberedAnswers, image_keys
from coordinator.student import Student, StudentSpec, pooled_features
from edge_teacher.agent.pooling import attention_pool, mean_pool

_BATCH = 250

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]
Reduce = Callable[[Floats, Floats], Floats]
"""(feature maps, saliency) of some images -> what is kept of them."""


class Fleet:
    """Eight networks; answers are remembered, float16, as a device would send them."""

    def __init__(
        self,
        name: str,
        identities: list[str],
        run: Callable[[int, Images], tuple[Floats, Floats]],
        work: Path,
    ) -> None:
        """`run`: (number, a batch) -> (feature maps [N, C, h, w], saliency [N, s, s])."""
        self.name = name
        self.identity = " ".join(identities)
        self._identities = identities
        self._run = run
        self._cache = RememberedAnswers(work / "answers")

    def pooled(self, index: int, images: Images) -> Floats:
        """[N, C]."""
        return self._known(index, images, "study pooled", lambda maps, _: mean_pool(maps))

    def averaged(self, index: int, images: Images) -> Floats:
        """Of the image and its mirror image, [N, C]."""
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        return (self.pooled(index, images) + self.pooled(index, mirrored)) / 2

    def attended(self, index: int, images: Images) -> Floats:
        """Under the teacher's own saliency, [N, C]."""
        return self._known(index, images, "study attended", attention_pool)

    def saliency(self, index: int, images: Images) -> Floats:
        """[N, s, s]."""
        return self._known(index, images, "study saliency", lambda _, saliency: saliency)

    def untrained(self, images: Images) -> Floats:
        """Features of a network that never learnt anything."""
        torch.manual_seed(0)
        net = Student(StudentSpec.of_images(images, ("none",), 24)).eval()
        found: Floats = pooled_features(net, images).numpy()
        return found

    def _known(self, index: int, images: Images, what: str, reduce: Reduce) -> Floats:
        question = Question(
            bundle=self._identities[index], method=what, query="", image_size=images.shape[1:3]
        )
        name = f"{self.name}-{index}"
        keys = image_keys(images)
        known = self._cache.known(question, name, keys)
        if known is not None and known.rows.all():
            return known.answers.astype(np.float32)
        there = np.zeros(len(keys), bool) if known is None else known.rows
        unknown = images[~there]
        answers = np.concatenate(
            [
                reduce(*self._run(index, unknown[start : start + _BATCH]))
                for start in range(0, len(unknown), _BATCH)
            ]
        ).astype(np.float16)
        self._cache.remember(question, name, keys[~there], answers)
        whole = np.empty((len(keys), *answers.shape[1:]), np.float32)
        whole[~there] = answers
        if known is not None:
            whole[there] = known.answers
        return whole


def alike(work: Path) -> Fleet:
    """The table's own teachers."""
    with RememberedAnswers(work / "answers") as cache:
        teachers = [LocalTeacher(path_of(index, work), cache) for index in range(COUNT)]

    def run(index: int, images: Images) -> tuple[Floats, Floats]:
        return teachers[index].features(images), teachers[index].saliency(images)

    return Fleet("alike", [t.identity for t in teachers], run, work)


def mixed(work: Path) -> Fleet:
    """The bundles in examples/teachers, as a device runs them."""
    paths = example_bundles()
    networks = [ExampleNetwork(path) for path in paths]
    identities = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def run(index: int, images: Images) -> tuple[Floats, Floats]:
        maps, saliency = networks[index].run(images, "features.last", "saliency")
        return maps, saliency

    return Fleet("mixed", identities, run, work)
