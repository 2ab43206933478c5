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
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import UPLOAD_BYTES
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

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> the mean over pixels of a feature map, [N, C].

        `tap` names the feature map; None: the last, at which the saliency is computed. `mirrored`
        asks about the mirror images, which the teacher makes itself.
        """
        ...

    def attended(
        self,
        images: NDArray[np.uint8],
        attention: NDArray[np.float32],
        *,
        tap: str | None = None,
    ) -> NDArray[np.float32]:
        """images [N, H, W, 3], attention [N, s, s] >= 0 -> features pooled under it, [N, C].

        sum_u A(u) F_c(u) / sum_u A(u), with A resized to the size of F; an attention that is zero
        everywhere gives the mean. Only the shape of a map counts, not its scale. It travels as
        fp16, each map scaled to a peak of 1. Raises UsageError for what is no attention.
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

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        return self._features(images, "pooled", mirrored=mirrored, tap=tap)

    def attended(
        self,
        images: NDArray[np.uint8],
        attention: NDArray[np.float32],
        *,
        tap: str | None = None,
    ) -> NDArray[np.float32]:
        maps = as_sent(attention, len(images))
        return self._features(images, "attention", tap=tap, attention=maps)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._features(images, "maps")

    def _features(
        self,
        images: NDArray[np.uint8],
        form: FeatureForm,
        *,
        mirrored: bool = False,
        tap: str | None = None,
        attention: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float32]:
        info = self._card.teacher
        if tap is not None and tap not in info.taps:
            known = ", ".join(sorted(info.taps))
            raise UsageError(f"{self.name} has no tap {tap!r}: take one of {known}")
        # One name for one question: a device takes no name for that of the saliency.
        named = "" if tap is None or tap == info.saliency_tap else tap

        def query(block: str) -> FeaturesQuery:
            return FeaturesQuery(block=block, tap=named, form=form, mirrored=mirrored)

        return self._ask(images, "features", query, "features", attention)

    def _ask(
        self,
        images: NDArray[np.uint8],
        method: str,
        query: Query,
        tensor: str,
        attention: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float32]:
        most = None
        if attention is not None:  # it goes with the question in one message
            most = max(1, UPLOAD_BYTES // attention[0].nbytes)
        divided = self._questions.divide(images, most)
        along: list[dict[str, NDArray[np.float16]]] | None = None
        keys = [self._key(method, query(image_block_id(block))) for block in divided]
        if attention is not None:
            ends = np.cumsum([len(block) for block in divided])[:-1]
            along = [{"attention": piece} for piece in np.split(attention, ends)]
            keys = [
                hashlib.sha256(key.encode() + maps["attention"].tobytes()).hexdigest()
                for key, maps in zip(keys, along, strict=True)
            ]
        answers = {
            i: found
            for i, key in enumerate(keys)
            if (found := self._cache.get(key, len(divided[i]))) is not None
        }
        unknown = [i for i in range(len(divided)) if i not in answers]
        # An answer is remembered by its question, however it travelled: it is the same within 0.5 %.
        asked = self._questions.ask(
            [divided[i] for i in unknown],
            method,
            query,
            tensor,
            along=None if along is None else [along[i] for i in unknown],
            adaptive=True,
        )
        for i, (_, answer) in zip(unknown, asked, strict=True):
            answers[i] = answer.astype(np.float16)
            if np.isfinite(answers[i]).all():  # a bad answer is not for ever
                self._cache.put(keys[i], answers[i])
        return np.concatenate([answers[i] for i in range(len(divided))]).astype(np.float32)

    def _key(self, method: str, query: msgspec.Struct) -> str:
        words = [self._card.bundle, method, msgspec.json.encode(query).decode()]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


def as_sent(attention: NDArray[np.float32], images: int) -> NDArray[np.float16]:
    """Attention [N, s, s] as it travels: each map scaled to a peak of 1, in fp16.

    Raises UsageError for maps of another number or form, with negative or non-finite values, or so
    large that one does not fit into a message.
    """
    if attention.ndim != 3 or len(attention) != images or 0 in attention.shape:
        raise UsageError(
            f"the attention has the shape {list(attention.shape)}, and must be [{images}, s, s]: "
            "one map for each image"
        )
    if not np.isfinite(attention).all() or attention.min() < 0:
        raise UsageError("the attention has negative or non-finite values: give 0 or more")
    if 2 * attention[0].size > UPLOAD_BYTES:
        raise UsageError(
            f"an attention map of {attention.shape[1]} × {attention.shape[2]} does not fit into a "
            "message: give a smaller one, it is resized to the features' size anyway"
        )
    peak = attention.max(axis=(1, 2), keepdims=True)
    scaled: NDArray[np.float16] = (attention / np.where(peak > 0, peak, 1)).astype(np.float16)
    return scaled
