"""What a device answers, method by method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_teacher.agent.image_store import ImageStore
from edge_teacher.agent.pooling import attention_pool, check_attention, mean_pool
from edge_teacher.agent.values import BYTES_PER_VALUE, Values
from edge_teacher.agent.work import Floats, Inference
from edge_teacher.contract import frame, packing
from edge_teacher.contract.errors import (
    CheckFailed,
    Malformed,
    NotFound,
    RpcError,
    RuntimeFailed,
    TooLarge,
    UsageError,
)
from edge_teacher.contract.messages import (
    Answered,
    Card,
    Dtype,
    Empty,
    FeaturesQuery,
    PredictQuery,
    PutImages,
    SaliencyQuery,
    StudentCommand,
    StudentOffer,
    StudentOffered,
    TeacherInfo,
)
from edge_teacher.rpc.line import Asked, Joint
from edge_teacher.rpc.serve import Answer, Method, Tensors
from edge_teacher.runtime import Session
from edge_teacher.slots import Students

_WIRE_BYTES: Mapping[Dtype, int] = {"u8": 1, "f16": 2, "f32": 4}

ENCODINGS = ("f16", "f32", "u8", *(("zstd",) if packing.available() else ()))
"""What this device offers in its card."""


class Answers:
    """Binds the teacher, the image store and the students to the contract's methods.

    What runs a graph is joint: `plan` says what it is, and a `Batcher` does it.
    """

    def __init__(
        self,
        teacher: TeacherInfo,
        session: Session,
        images: ImageStore,
        students: Students,
        card: Callable[[], Card],
        card_changed: Callable[[], None],
        *,
        max_answer_bytes: int,
    ) -> None:
        self._teacher = teacher
        self._session = session
        self._images = images
        self._students = students
        self._card = card
        self._card_changed = card_changed
        self._max_answer_bytes = max_answer_bytes

    def limit(self, max_answer_bytes: int) -> None:
        """Another bound, from the next question on."""
        self._max_answer_bytes = max_answer_bytes

    def methods(self) -> dict[str, Method[Any] | Joint[Any]]:
        return {
            "describe": Method(Empty, self.describe),
            "put_images": Method(PutImages, self.put_images),
            # Queries about the same pixels, through the same graph, are about the same.
            "saliency": Joint(SaliencyQuery, lambda query: (None, query.block, False)),
            "features": Joint(FeaturesQuery, lambda query: (None, query.block, query.mirrored)),
            "predict": Joint(PredictQuery, lambda query: (query.task, query.block, False)),
            "student.offer": Method(StudentOffer, self.student_offer, changes=True),
            "student.status": Method(StudentCommand, self.student_status),
            "student.activate": Method(StudentCommand, self.student_activate, changes=True),
            "student.rollback": Method(StudentCommand, self.student_rollback, changes=True),
        }

    def plan(self, asked: Asked) -> Inference:
        """What a joint query needs. Raises NotFound, Malformed, TooLarge."""
        query = asked.request
        if isinstance(query, SaliencyQuery):
            return self._saliency(query)
        if isinstance(query, FeaturesQuery):
            return self._features(query, asked.tensors)
        assert isinstance(query, PredictQuery)
        return self._predict(query)

    def describe(self, _request: Empty, _tensors: Tensors) -> Answer:
        return self._card(), {}

    def put_images(self, request: PutImages, tensors: Tensors) -> Answer:
        return self._images.put(request, frame.tensor(tensors, "data", "u8", None)), {}

    def _saliency(self, query: SaliencyQuery) -> Inference:
        images = self._images.get(query.block)
        maps = Values("saliency", query.dtype, by_channel=False)
        values = len(images) * math.prod(self._teacher.saliency_size)
        return Inference(
            session=self._session,
            images=images,
            pixels=query.block,
            mirrored=False,
            outputs=frozenset({"saliency"}),
            keep=lambda found, _where: maps.kept(found["saliency"]),
            finish=lambda whole, ms: maps.answer(whole, Answered(compute_ms=round(ms, 3))),
            needs_bytes=values * BYTES_PER_VALUE[query.dtype],
            same=query.dtype,
        )

    def _features(self, query: FeaturesQuery, tensors: Tensors) -> Inference:
        tap = query.tap or self._teacher.saliency_tap
        if tap not in self._teacher.taps:
            known = ", ".join(sorted(self._teacher.taps))
            raise NotFound(f"this teacher has no tap {tap!r}; it has {known}")
        images = self._images.get(query.block)
        info = self._teacher.taps[tap]
        values = len(images) * info.channels
        if query.form == "maps":
            values *= info.height * info.width
            self._require_small(values, query.dtype)
        attention: Floats | None = None
        if query.form == "attention":
            attention = frame.floats(tensors, "attention")
            check_attention(attention, len(images))
        output = f"features.{tap}"
        features = Values("features", query.dtype, by_channel=True)
        maps = Values("saliency", query.dtype, by_channel=False) if query.saliency else None

        def keep(found: Mapping[str, Floats], where: slice) -> dict[str, NDArray[np.generic]]:
            of = found[output]
            if attention is not None:
                of = attention_pool(of, attention[where])
            elif query.form == "pooled":
                of = mean_pool(of)
            kept = features.kept(of)
            return kept if maps is None else kept | maps.kept(found["saliency"])

        def finish(whole: Mapping[str, NDArray[np.generic]], ms: float) -> Answer:
            answered, made = features.answer(whole, Answered(compute_ms=round(ms, 3)))
            if maps is None:
                return answered, made
            assert isinstance(answered, Answered)
            answered, more = maps.answer(whole, answered)
            return answered, {**made, **more}

        if maps is not None:
            values += len(images) * math.prod(self._teacher.saliency_size)
        return Inference(
            session=self._session,
            images=images,
            pixels=query.block,
            mirrored=query.mirrored,
            outputs=frozenset({output} if maps is None else {output, "saliency"}),
            keep=keep,
            finish=finish,
            needs_bytes=values * BYTES_PER_VALUE[query.dtype],
            same=None if attention is not None else (tap, query.form, query.dtype, query.saliency),
        )

    def _require_small(self, values: int, dtype: Dtype) -> None:
        """Known before anything is computed: maps of many images may be larger than the memory."""
        size = values * _WIRE_BYTES[dtype]
        if size > self._max_answer_bytes:
            raise TooLarge(
                f"the answer would have {size} bytes, and the limit is {self._max_answer_bytes}; ask "
                "about fewer images at once"
            )

    def _predict(self, query: PredictQuery) -> Inference:
        images = self._images.get(query.block)
        student = self._students.active(query.task)
        card = student.card
        # A student may answer for every pixel.
        values = len(images) * len(card.classes)
        if card.task_kind == "dense":
            values *= math.prod(card.input_size)
        self._require_small(values, "f32")

        def keep(found: Mapping[str, Floats], _where: slice) -> dict[str, NDArray[np.generic]]:
            # Of a student that answers with more than its card lets expect, known from its first step.
            self._require_small(found["logits"][0].size * len(images), "f32")
            return {"logits": found["logits"].astype(np.float32, copy=False)}

        def finish(whole: Mapping[str, NDArray[np.generic]], ms: float) -> Answer:
            return Answered(
                compute_ms=round(ms, 3),
                student_version=card.version,
                classes=card.classes,
                task_kind=card.task_kind,
                decision=card.decision,
            ), dict(whole)

        return Inference(
            session=student.session,
            images=images,
            pixels=query.block,
            mirrored=False,
            outputs=frozenset({"logits"}),
            keep=keep,
            finish=finish,
            needs_bytes=values * BYTES_PER_VALUE["f32"],
        )

    def student_offer(self, offer: StudentOffer, tensors: Tensors) -> Answer:
        data = frame.tensor(tensors, "data", "u8", None)
        with _as_answers(Malformed):
            received = self._students.offer(offer, data.tobytes())
        if received.next_offset == received.total_bytes:
            self._card_changed()
        return StudentOffered(received=received, status=self._students.status(offer.task)), {}

    def student_status(self, command: StudentCommand, _tensors: Tensors) -> Answer:
        return self._students.status(command.task), {}

    def student_activate(self, command: StudentCommand, _tensors: Tensors) -> Answer:
        try:
            with _as_answers(RuntimeFailed):
                self._students.activate(command.task, command.version)
        finally:
            self._card_changed()
        return self._students.status(command.task), {}

    def student_rollback(self, command: StudentCommand, _tensors: Tensors) -> Answer:
        try:
            with _as_answers(RuntimeFailed):
                self._students.rollback(command.task)
        finally:
            self._card_changed()
        return self._students.status(command.task), {}


@contextmanager
def _as_answers(check_failed: type[RpcError]) -> Iterator[None]:
    """Errors of this machine's own as those that travel: a task's unusable name is the asker's."""
    try:
        yield
    except CheckFailed as error:
        raise check_failed(str(error)) from error
    except UsageError as error:
        raise Malformed(str(error)) from error
    except OSError as error:
        raise RuntimeFailed(f"this device cannot store the student: {error.strerror}") from error
