"""A trained student as a signed bundle: FP32, INT8 in two dialects, its canary batch and its report."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator.data import LabelledImages
from coordinator.kinds import Kind
from coordinator.kinds.kind import Labels
from coordinator.student import Student, StudentSpec
from edge_teacher import bundle as bundles
from edge_teacher.bundle import StudentCard
from edge_teacher.contract.errors import UsageError
from export.checks.scoring import Scoring
from export.graph import InputSpec
from export.student import FP32, INT8_CPU, INT8_TENSORRT, export_student, require_exportable
from export.student_report import StudentReport

# Of the decisions that rounding cannot change; it is what a card says of a classifier, whose all are so.
_LEAST_AGREEMENT = 0.99
GRAPHS = {"int8_cpu": INT8_CPU, "int8_tensorrt": INT8_TENSORRT, "fp32": FP32}


@dataclass(frozen=True)
class PackagedStudent:
    bundle: bytes
    card: StudentCard
    report: StudentReport


def next_version() -> int:
    """The time in UTC as yyyymmddhhmmss: every later one is higher, and a person can read it."""
    return int(time.strftime("%Y%m%d%H%M%S", time.gmtime()))


def package_student(
    student: Student,
    task: str,
    version: int,
    calibration: NDArray[np.uint8],
    holdout: LabelledImages | None,
    key: Ed25519PrivateKey,
    *,
    largest_drop: float,
    head: str | None = None,
) -> PackagedStudent:
    """Quantise, check and sign the student with the head for one of its tasks; of the only one, unless named.

    `task` is its name on the devices. Raises CheckFailed if the files do not answer as the student does,
    or if an INT8 file loses more than `largest_drop` by the first metric of the task's kind on `holdout`;
    without one that cannot be known. Raises UsageError for a head the student has not, or a holdout with a
    class that it does not know or of another kind.
    """
    spec = student.spec
    _, answers = spec.head(head)
    kind = student.kind(head)
    held = None if holdout is None else (holdout.images, _labels(holdout, kind, answers.classes))
    exported = export_student(
        student.network(head),
        InputSpec((spec.height, spec.width), spec.mean, spec.std),
        answers.classes,
        calibration,
        held,
        largest_drop=largest_drop if held is not None else None,
        scoring=_scoring(kind),
    )
    canary = exported.canary
    card = StudentCard(
        task=task,
        version=version,
        classes=answers.classes,
        task_kind=kind.name,
        decision=kind.decision,
        canary_agreement=_LEAST_AGREEMENT * canary.certain,
        input_size=(spec.height, spec.width),
        graphs=GRAPHS,
        canary_logits={dialect: f"canary.{dialect}.npy" for dialect in GRAPHS},
    )
    files = {
        **exported.files,
        card.canary_images: _npy(canary.images),
        **{card.canary_logits[d]: _npy(canary.logits[file]) for d, file in GRAPHS.items()},
        "report.json": msgspec.json.format(msgspec.json.encode(exported.report), indent=1),
    }
    return PackagedStudent(bundles.pack(card, files, key), card, exported.report)


def require_packageable(spec: StudentSpec) -> None:
    """Before it is trained: whether a student of this form can be packaged. Raises what would stop it."""
    student = Student(spec).eval()
    for head, answers in spec.heads.items():
        require_exportable(
            student.network(head),
            InputSpec((spec.height, spec.width), spec.mean, spec.std),
            len(answers.classes),
            scoring=_scoring(student.kind(head)),
        )


def _scoring(kind: Kind) -> Scoring:
    metric = kind.metrics[0]
    return Scoring(
        kind=kind.name,
        decision=kind.decision,
        dimensions=kind.dimensions,
        metric=metric,
        kept=kind.kept,
        measure=lambda kept, labels: kind.measure(kept, labels)[metric],
    )


def _labels(holdout: LabelledImages, kind: Kind, classes: tuple[str, ...]) -> Labels:
    """The holdout's labels by the student's class numbers: names are what both agree on."""
    if holdout.kind != kind.name:
        raise UsageError(
            f"the holdout is {holdout.kind} and the student {kind.name}: give labels of the student's kind"
        )
    unknown = [name for name in holdout.classes if name not in classes]
    if unknown:
        raise UsageError(
            f"the holdout has the class {', '.join(unknown)}, which the student does not know; it knows "
            f"{', '.join(classes)}"
        )
    numbers = np.array([classes.index(name) for name in holdout.classes], dtype=np.int64)
    return kind.renumbered(holdout.checked("the holdout").labels, numbers, len(classes))


def _npy(array: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
