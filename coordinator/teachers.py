"""A teacher as the coordinator sees it: something that answers questions about images."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.encodings import EncodingLedger
from coordinator.questions import Query, Questions
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.messages import Card, FeatureForm, FeaturesQuery, SaliencyQuery
from edge_teacher.files import write_atomically
from edge_teacher.rpc.invoke import Caller


class Teacher(Protocol):
    """What selection and amalgamation may ask of a teacher, wherever it runs."""

    @property
    def name(self) -> str:
        """The device id; unique in a fleet."""
        ...

    @property
    def identity(self) -> str:
        """Changes with the network: answers of one identity belong together."""
        ...

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> maps [N, S, S] in [0, 1]."""
        ...

    def pooled(self, images: NDArray[np.uint8], *, mirrored: bool = False) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> the mean over pixels of the last feature map, [N, C].

        `mirrored` asks about the mirror images, which the teacher makes itself.
        """
        ...

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> the last feature map itself, [N, C, h, w]."""
        ...


class AnswerCache:
    """Answers on disk, one file per (bundle, question, block): a resumed run asks nothing twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, images: int) -> NDArray[np.float16] | None:
        """None for what is not there; a file that is no answer about so many images is dropped."""
        path = self._folder / f"{key}.npy"
        try:
            found = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, BadZipFile):
            found = None
        answer = isinstance(found, np.ndarray) and found.dtype == np.float16
        if not answer or found.shape[:1] != (images,):
            path.unlink(missing_ok=True)
            return None
        return np.asarray(found, np.float16)

    def put(self, key: str, answer: NDArray[np.float16]) -> None:
        file = io.BytesIO()
        np.save(file, answer, allow_pickle=False)
        write_atomically(self._folder / f"{key}.npy", file.getvalue())


class RemoteTeacher:
    """A teacher behind MQTT. Its answers are remembered; it is asked only for what is not."""

    def __init__(
        self,
        caller: Caller,
        card: Card,
        cache: AnswerCache,
        ledger: EncodingLedger | None = None,
    ) -> None:
        self._card = card
        self._cache = cache
        self._questions = Questions(caller, card, ledger=ledger)

    @property
    def name(self) -> str:
        return self._card.device

    @property
    def identity(self) -> str:
        return self._card.bundle

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._ask(images, "saliency", lambda block: SaliencyQuery(block=block), "saliency")

    def pooled(self, images: NDArray[np.uint8], *, mirrored: bool = False) -> NDArray[np.float32]:
        return self._features(images, "pooled", mirrored)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._features(images, "maps", mirrored=False)

    def _features(
        self, images: NDArray[np.uint8], form: FeatureForm, mirrored: bool
    ) -> NDArray[np.float32]:
        def query(block: str) -> FeaturesQuery:
            return FeaturesQuery(block=block, form=form, mirrored=mirrored)

        return self._ask(images, "features", query, "features")

    def _ask(
        self, images: NDArray[np.uint8], method: str, query: Query, tensor: str
    ) -> NDArray[np.float32]:
        divided = list(self._questions.divide(images))
        keys = [self._key(method, query(image_block_id(block))) for block in divided]
        answers = {
            i: found
            for i, key in enumerate(keys)
            if (found := self._cache.get(key, len(divided[i]))) is not None
        }
        unknown = [i for i in range(len(divided)) if i not in answers]
        # An answer is remembered by its question, however it travelled: it is the same within 0.5 %.
        asked = self._questions.ask(
            [divided[i] for i in unknown], method, query, tensor, adaptive=True
        )
        for i, (_, answer) in zip(unknown, asked, strict=True):
            answers[i] = answer.astype(np.float16)
            if np.isfinite(answers[i]).all():  # a bad answer is not for ever
                self._cache.put(keys[i], answers[i])
        return np.concatenate([answers[i] for i in range(len(divided))]).astype(np.float32)

    def _key(self, method: str, query: msgspec.Struct) -> str:
        words = [self._card.bundle, method, msgspec.json.encode(query).decode()]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()
