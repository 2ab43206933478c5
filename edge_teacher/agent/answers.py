"""What a device answers, method by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.agent.image_store import ImageStore
from edge_teacher.agent.pooling import attention_pool, check_attention, mean_pool
from edge_teacher.contract import frame, packing, quantised
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
from edge_teacher.rpc.serve import Answer, Method, Tensors
from edge_teacher.runtime import Session, run_in_batches
from edge_teacher.slots import Students

_NUMPY: Mapping[Dtype, type[np.floating[Any]]] = {"f16": np.float16, "f32": np.float32}

_BYTES: Mapping[Dtype, int] = {"u8": 1, "f16": 2, "f32": 4}

ENCODINGS = ("f16", "f32", "u8", *(("zstd",) if packing.available() else ()))
"""What this device offers in its card."""


class Answers:
    """Binds the teacher, the image store and the students to the contract's methods."""

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

    def methods(self) -> dict[str, Method[Any]]:
        return {
            "describe": Method(Empty, self.describe),
            "put_images": Method(PutImages, self.put_images),
            "saliency": Method(SaliencyQuery, self.saliency),
            "features": Method(FeaturesQuery, self.features),
            "predict": Method(PredictQuery, self.predict),
            "student.offer": Method(StudentOffer, self.student_offer, changes=True),
            "student.status": Method(StudentCommand, self.student_status),
            "student.activate": Method(StudentCommand, self.student_activate, changes=True),
            "student.rollback": Method(StudentCommand, self.student_rollback, changes=True),
        }

    def describe(self, _request: Empty, _tensors: Tensors) -> Answer:
        return self._card(), {}

    def put_images(self, request: PutImages, tensors: Tensors) -> Answer:
        return self._images.put(request, frame.tensor(tensors, "data", "u8", None)), {}

    def saliency(self, query: SaliencyQuery, _tensors: Tensors) -> Answer:
        images = self._images.get(query.block)
        started = time.perf_counter()
        maps = run_in_batches(self._session, images, "saliency")
        return _encoded(_answered(started), "saliency", maps, query.dtype, by_channel=False)

    def features(self, query: FeaturesQuery, tensors: Tensors) -> Answer:
        tap = query.tap or self._teacher.saliency_tap
        if tap not in self._teacher.taps:
            known = ", ".join(sorted(self._teacher.taps))
            raise NotFound(f"this teacher has no tap {tap!r}; it has {known}")
        images = self._images.get(query.block)
        started = time.perf_counter()
        if query.mirrored:
            images = np.ascontiguousarray(images[:, :, ::-1])
        info = self._teacher.taps[tap]
        if query.form == "maps":
            self._require_small(len(images) * info.channels * info.height * info.width, query.dtype)

        def reduce(maps: NDArray[np.float32], where: slice) -> NDArray[np.float32]:
            if query.form == "pooled":
                return mean_pool(maps)
            return maps if attention is None else attention_pool(maps, attention[where])

        attention = None
        if query.form == "attention":
            attention = frame.floats(tensors, "attention")
            check_attention(attention, len(images))
        found = run_in_batches(self._session, images, f"features.{tap}", reduce=reduce)
        return _encoded(_answered(started), "features", found, query.dtype, by_channel=True)

    def _require_small(self, values: int, dtype: Dtype) -> None:
        """Known before anything is computed: maps of many images may be larger than the memory."""
        size = values * _BYTES[dtype]
        if size > self._max_answer_bytes:
            raise TooLarge(
                f"the answer would have {size} bytes, and the limit is {self._max_answer_bytes}; ask "
                "about fewer images at once"
            )

    def predict(self, query: PredictQuery, _tensors: Tensors) -> Answer:
        images = self._images.get(query.block)
        student = self._students.active(query.task)
        card = student.card

        def small(found: NDArray[np.float32], _where: slice) -> NDArray[np.float32]:
            # A student may answer for every pixel: known from its first batch.
            self._require_small(found[0].size * len(images), "f32")
            return found

        started = time.perf_counter()
        logits = run_in_batches(student.session, images, "logits", reduce=small)
        answered = _answered(started)
        return msgspec.structs.replace(
            answered,
            student_version=card.version,
            classes=card.classes,
            task_kind=card.task_kind,
            decision=card.decision,
        ), {"logits": logits.astype(np.float32)}

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


def _encoded(
    answered: Answered,
    name: str,
    values: NDArray[np.float32],
    dtype: Dtype,
    *,
    by_channel: bool,
) -> Answer:
    """The values in the dtype that was asked for, and what that cost."""
    started = time.perf_counter()
    error = 0.0
    if dtype == "u8":
        if not np.isfinite(values).all():
            raise RuntimeFailed(f"the {name} are not all finite; ask for them as f32 to see them")
        tensors = quantised.quantise(values, name, by_channel=by_channel)
        error = quantised.relative_error(values, quantised.floats(tensors, name))
    else:
        # fp16 ends at 65504; a feature beyond is held there rather than turned into infinity.
        held = np.clip(values, -65504, 65504) if dtype == "f16" else values
        tensors = {name: held.astype(_NUMPY[dtype])}
    spent = round((time.perf_counter() - started) * 1e3, 3)
    return msgspec.structs.replace(answered, encode_ms=spent, encode_error=error), tensors


def _answered(started: float) -> Answered:
    return Answered(compute_ms=round((time.perf_counter() - started) * 1e3, 3))
