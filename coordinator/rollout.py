"""Students to devices: one canary device first, then the others; a failure halts the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.parallel import in_parallel
from coordinator.questions import Questions
from coordinator.uploads import upload
from edge_teacher.bundle import StudentCard
from edge_teacher.contract.errors import CheckFailed, FedsaError, UsageError
from edge_teacher.contract.images import Images
from edge_teacher.contract.messages import (
    Card,
    PredictQuery,
    StudentCommand,
    StudentOffer,
    StudentOffered,
    StudentStatus,
)
from edge_teacher.rpc.invoke import Caller

WAVE = 4
"""Devices installed on at the same time; the next ones wait for all of these."""


class Predictions(msgspec.Struct, frozen=True):
    """What a deployed student says."""

    logits: NDArray[np.float32]
    """[N, classes], or of a dense task [N, classes, H, W]"""
    classes: tuple[str, ...]
    version: int
    compute_ms: float
    task_kind: str = "single-label"
    decision: str = "top-1"


def install(caller: Caller, device: str, card: StudentCard, bundle: bytes) -> StudentStatus:
    """Send a bundle, from where an interrupted sending stopped, and activate it.

    Raises what the device answers: a wrong signature, an old version, a failed canary batch.
    """
    digest = hashlib.sha256(bundle).hexdigest()

    def send(offset: int, piece: NDArray[np.uint8]) -> int:
        offer = StudentOffer(
            task=card.task,
            version=card.version,
            digest=digest,
            total_bytes=len(bundle),
            offset=offset,
        )
        offered, _ = caller.call(
            device, "student.offer", offer, {"data": piece}, answer=StudentOffered
        )
        return offered.received.next_offset

    upload(np.frombuffer(bundle, np.uint8), send, to=device)
    command = StudentCommand(task=card.task, version=card.version)
    status, _ = caller.call(device, "student.activate", command, answer=StudentStatus)
    return status


def roll_out(
    caller: Caller,
    devices: Sequence[str],
    card: StudentCard,
    bundle: bytes,
    *,
    installed: Callable[[], None] = lambda: None,
) -> dict[str, StudentStatus]:
    """Install on the first device as the canary, then on the others in waves of four.

    `installed` is called on this thread, once per device. Raises UsageError without devices, and
    CheckFailed naming every device on which it failed, and why, and every one that was not asked: after
    the wave, or the canary, in which one fails, no other is touched.
    """
    if not devices:
        raise UsageError(
            f"there is no device to install version {card.version} of {card.task!r} on"
        )
    done: dict[str, StudentStatus] = {}

    def attempt(device: str) -> FedsaError | None:
        try:
            done[device] = install(caller, device, card, bundle)
        except FedsaError as error:
            return error
        return None

    # One canary, then waves: a wave ends before the next begins.
    waves = [devices[:1], *(devices[i : i + WAVE] for i in range(1, len(devices), WAVE))]
    for number, wave in enumerate(waves):
        outcomes = zip(wave, in_parallel(wave, attempt, installed), strict=True)
        failures = {device: error for device, error in outcomes if error is not None}
        if failures:
            untouched = [device for later in waves[number + 1 :] for device in later]
            raise CheckFailed(
                f"version {card.version} of {card.task!r} was not installed on "
                + "; ".join(f"{device}: {error}" for device, error in sorted(failures.items()))
                + f" (not touched: {', '.join(untouched) or 'none'})"
            )
    return done


def predict(caller: Caller, device: Card, task: str, images: Images) -> Predictions:
    """What `device` answers with its active student of `task`. Raises NotFound without one."""
    questions = Questions(caller, device)
    answers = list(
        questions.ask(
            questions.divide(images),
            "predict",
            lambda block: PredictQuery(task=task, block=block),
            "logits",
        )
    )
    first = answers[0][0]
    if any(answered.student_version != first.student_version for answered, _ in answers):
        raise CheckFailed(
            f"the student of {task!r} on {device.device} was replaced while it answered; ask again"
        )
    return Predictions(
        logits=np.concatenate([logits for _, logits in answers]),
        classes=first.classes,
        version=first.student_version,
        compute_ms=sum(answered.compute_ms for answered, _ in answers),
        task_kind=first.task_kind,
        decision=first.decision,
    )
