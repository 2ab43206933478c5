"""Students to devices: one canary device first, then the others; a failure halts the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.questions import Questions
from edge_teacher.bundle import StudentCard
from edge_teacher.contract.errors import Busy, CheckFailed, FedsaError, UsageError
from edge_teacher.contract.images import Images
from edge_teacher.contract.limits import UPLOAD_BYTES
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
    """[N, classes]"""
    classes: tuple[str, ...]
    version: int
    compute_ms: float


def install(caller: Caller, device: str, card: StudentCard, bundle: bytes) -> StudentStatus:
    """Send a bundle, from where an interrupted sending stopped, and activate it.

    Raises what the device answers: a wrong signature, an old version, a failed canary batch.
    """
    digest = hashlib.sha256(bundle).hexdigest()
    data = np.frombuffer(bundle, np.uint8)
    piece, offset = data[:0], 0
    # Begun again a few times, where another offer takes its place; not for ever.
    for _ in range(8 + 4 * (len(bundle) // UPLOAD_BYTES)):
        offered, _ = caller.call(
            device,
            "student.offer",
            StudentOffer(
                task=card.task,
                version=card.version,
                digest=digest,
                total_bytes=len(bundle),
                offset=offset,
            ),
            {"data": piece},
            answer=StudentOffered,
        )
        offset = offered.received.next_offset
        if offset == len(bundle):
            break
        piece = data[offset : offset + UPLOAD_BYTES]
    else:
        raise Busy(f"{device} does not keep what it is sent of {card.task!r}; try again later")
    command = StudentCommand(task=card.task, version=card.version)
    status, _ = caller.call(device, "student.activate", command, answer=StudentStatus)
    return status


def roll_out(
    caller: Caller,
    devices: Sequence[str],
    card: StudentCard,
    bundle: bytes,
    *,
    installed: Callable[[StudentStatus, str], None] = lambda status, device: None,
) -> dict[str, StudentStatus]:
    """Install on the first device as the canary, then on the others in waves of four.

    Raises UsageError without devices, and CheckFailed naming every device that refused and every one
    that was not asked: after the wave, or the canary, in which one refuses, no other is touched.
    """
    if not devices:
        raise UsageError(
            f"there is no device to install version {card.version} of {card.task!r} on"
        )
    done: dict[str, StudentStatus] = {}

    def one(device: str) -> None:
        done[device] = install(caller, device, card, bundle)
        installed(done[device], device)

    canary, *others = devices
    try:
        one(canary)
    except FedsaError as error:
        raise CheckFailed(
            f"the canary device {canary} refused version {card.version} of {card.task!r}, so no "
            f"other device was touched: {error}"
        ) from error
    with ThreadPoolExecutor(WAVE, thread_name_prefix="roll-out") as pool:
        for start in range(0, len(others), WAVE):
            failures = []
            for device, future in [(d, pool.submit(one, d)) for d in others[start : start + WAVE]]:
                try:
                    future.result()
                except FedsaError as error:
                    failures.append(f"{device}: {error}")
            if failures:
                untouched = ", ".join(others[start + WAVE :]) or "none"
                raise CheckFailed(
                    f"{len(failures)} of {len(devices)} devices refused version {card.version} of "
                    f"{card.task!r}: {'; '.join(failures)} (not touched: {untouched})"
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
    )
