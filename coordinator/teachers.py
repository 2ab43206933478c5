"""A teacher as the coordinator sees it: something that answers questions about images."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.answers import Question, RememberedAnswers, image_keys
from coordinator.answers.checks import flat_maps
from coordinator.encodings import EncodingLedger
from coordinator.questions import PATIENCE_S, Query, Questions, Tensors
from edge_teacher.contract.errors import Malformed, UsageError
from edge_teacher.contract.images import check_images
from edge_teacher.contract.limits import UPLOAD_BYTES
from edge_teacher.contract.messages import Card, Dtype, FeatureForm, FeaturesQuery, SaliencyQuery
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


class RemoteTeacher:
    """A teacher behind MQTT. Its answers are remembered; it is asked only for what is not."""

    def __init__(
        self,
        caller: Caller,
        card: Card,
        cache: RememberedAnswers,
        ledger: EncodingLedger | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`patience_s`: how long one answer may take before Unreachable is raised."""
        self._card = card
        self._cache = cache
        self._questions = Questions(caller, card, timeout_s=patience_s, ledger=ledger)

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
        images = check_images(images)
        keys = image_keys(images, attention)
        question = Question(
            bundle=self._card.bundle,
            method=method,
            query=_words(query("")),
            image_size=images.shape[1:3],
        )
        coarse = msgspec.structs.replace(question, encoding="u8")
        dtype = self._dtype(coarse)
        gathered = _Gathered(self.name, method, len(images))
        # What is exact may stand for what may be coarse, and never the other way round.
        for served in (question, coarse) if dtype == "u8" else (question,):
            unknown = gathered.unknown
            known = self._cache.known(served, self.name, keys[unknown])
            if known is not None:
                gathered.put(unknown[known.rows], known.answers)
        unknown = gathered.unknown
        if not len(unknown):
            return gathered.answers()
        asked = question if dtype != "u8" else coarse
        if len(unknown) < len(images):
            images, attention = images[unknown], None if attention is None else attention[unknown]
        divided, along = self._divide(images, attention)
        start = 0
        for _, answer in self._questions.ask(
            divided, method, query, tensor, along=along, dtype=dtype
        ):
            self._require(answer, method, query(""))
            rows = unknown[start : start + len(answer)]
            start += len(answer)
            half = answer.astype(np.float16)
            gathered.put(rows, half)
            if _worth_remembering(method, half):
                self._cache.remember(asked, self.name, keys[rows], half)
        return gathered.answers()

    def _require(self, answer: NDArray[np.float32], method: str, query: msgspec.Struct) -> None:
        """The form that its card promises. Raises Malformed: it would be remembered otherwise."""
        if isinstance(query, FeaturesQuery):
            tap = self._card.teacher.taps[query.tap or self._card.teacher.saliency_tap]
            dimensions = 4 if query.form == "maps" else 2
            right = answer.ndim == dimensions and answer.shape[1] == tap.channels
            form = f"[N, {tap.channels}" + (", h, w]" if dimensions == 4 else "]")
        else:
            right, form = answer.ndim == 3, "[N, S, S]"
        if not right or 0 in answer.shape:
            raise Malformed(
                f"{self.name} answered {method} with {list(answer.shape)}, and its card says {form}"
            )

    def _dtype(self, coarse: Question) -> Dtype:
        """By the speed of the link, and before that is known as it was the last time."""
        dtype = self._questions.dtype()
        if dtype is not None:
            return dtype
        again = "u8" in self._card.encodings and self._cache.asked_before(coarse)
        return "u8" if again else "f16"

    def _divide(
        self, images: NDArray[np.uint8], attention: NDArray[np.float16] | None
    ) -> tuple[list[NDArray[np.uint8]], list[Tensors] | None]:
        """The blocks, and what goes with each: in one message, so it must fit into one."""
        if attention is None:
            return self._questions.divide(images), None
        divided = self._questions.divide(images, max(1, UPLOAD_BYTES // attention[0].nbytes))
        ends = np.cumsum([len(block) for block in divided])[:-1]
        return divided, [{"attention": piece} for piece in np.split(attention, ends)]


def _words(query: msgspec.Struct) -> str:
    """What a query says besides the block it is about and how the answer is to travel."""
    words = msgspec.to_builtins(query)
    for name in ("block", "dtype"):
        words.pop(name, None)
    return msgspec.json.encode(words, order="sorted").decode()


def _worth_remembering(method: str, answer: NDArray[np.float16]) -> bool:
    """A device may be out of order today and whole tomorrow: a bad answer is not for ever."""
    if not np.isfinite(answer).all():
        return False
    return method != "saliency" or not flat_maps(answer).all()


class _Gathered:
    """Answers about `images` images, from wherever they come, in the order of the images."""

    def __init__(self, teacher: str, method: str, images: int) -> None:
        self._who = f"{teacher} answered {method}"
        self._there = np.zeros(images, bool)
        self._answers: NDArray[np.float32] | None = None

    @property
    def unknown(self) -> NDArray[np.int64]:
        """Of which there is no answer yet."""
        return np.flatnonzero(~self._there)

    def put(self, rows: NDArray[np.int64], answers: NDArray[np.float16]) -> None:
        """Raises Malformed if they do not have the shape of those before."""
        if self._answers is None:
            self._answers = np.empty((len(self._there), *answers.shape[1:]), np.float32)
        if self._answers.shape[1:] != answers.shape[1:]:
            raise Malformed(
                f"{self._who} with {list(answers.shape[1:])} for one image, and with "
                f"{list(self._answers.shape[1:])} for another"
            )
        self._answers[rows] = answers
        self._there[rows] = True

    def answers(self) -> NDArray[np.float32]:
        """All of them, [N, ...]."""
        assert self._answers is not None
        return self._answers


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
