"""A trained student as the files a device can run: FP32, and INT8 in the two dialects of Q/DQ.

    trained module ──torch.onnx──▶ float NCHW graph ──input_graph──▶ student.fp32.onnx
                                                                      │  (parity against torch,
                                                                      float64)
                                       calibration images ──quantise──┤
                                                                      ├─▶ student.int8.cpu.onnx
                                                                      └─▶ student.int8.tensorrt.onnx

What comes back is bytes, a report and a canary batch; signing them into a bundle is the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from edge_teacher.contract.decisions import decisions
from edge_teacher.contract.errors import CheckFailed, UsageError
from export.checks.scoring import TOP_1, Scoring
from export.checks.student import Canary, OnnxClassifier, check_parity, choose_canary
from export.checks.tensorrt import check_tensorrt, installed_tensorrt
from export.graph import InputSpec
from export.input_graph import IMAGES, take_uint8_images
from export.quantise import Dialect, quantise
from export.student_report import FileReport, StudentReport
from export.torch_to_onnx import torch_to_onnx

__all__ = [
    "Canary",
    "FileReport",
    "StudentFiles",
    "StudentReport",
    "export_student",
    "require_exportable",
]

FP32 = "student.fp32.onnx"
INT8_CPU = "student.int8.cpu.onnx"
INT8_TENSORRT = "student.int8.tensorrt.onnx"
# The upper end of the profile TensorRT is asked with; the device builds its engine with its own.
_TENSORRT_BATCH = 32
_BATCH = 64


@dataclass(frozen=True)
class StudentFiles:
    """An exported student: `files` by name, and how it did."""

    files: dict[str, bytes]
    report: StudentReport
    canary: Canary


def export_student(
    module: nn.Module,
    given: InputSpec,
    classes: Sequence[str],
    calibration: NDArray[np.uint8],
    holdout: tuple[NDArray[np.uint8], NDArray[Any]] | None = None,
    *,
    largest_drop: float | None = None,
    scoring: Scoring = TOP_1,
) -> StudentFiles:
    """Export a trained student, quantise it, and check that it still is the same student.

    Args:
        module: float[N, 3, h, w] normalised -> logits float[N, classes], or [N, classes, h, w] where
            `scoring` says so. Neither changed nor moved.
        given: the size and normalisation the module was trained with.
        classes: names in the order of the logits.
        calibration: uint8[N, H, W, 3], images like those the device will see; labels are not
            needed.
        holdout: images uint8[N, H, W, 3] and labels, as `scoring` measures by, to measure on.
        largest_drop: refuse an INT8 file that is more than this fraction under FP32 by the metric of
            `scoring` on the holdout.
        scoring: what kind of student it is. Labels other than a classifier's are the caller's to check.

    Raises:
        UsageError: the arrays, the classes or the module do not fit together.
        CheckFailed: the exported file does not compute what the module does, or an INT8 file lost
            too much.
    """
    _check_images("calibration", calibration)
    if holdout is not None:
        _check_holdout(*holdout, len(classes), scoring)
    if largest_drop is not None and holdout is None:
        raise UsageError(
            "largest_drop needs a labelled holdout to measure the drop on: give holdout="
        )
    module = copy.deepcopy(module).to("cpu", torch.float32).eval()
    fp32 = take_uint8_images(_to_onnx(module, given, len(classes), scoring.dimensions), given)
    models = {
        FP32: fp32,
        INT8_CPU: quantise(fp32, calibration, Dialect.CPU),
        INT8_TENSORRT: quantise(fp32, calibration, Dialect.TENSORRT),
    }
    files = {name: model.SerializeToString(deterministic=True) for name, model in models.items()}
    parity_error = check_parity(module, given, files[FP32])
    reports = _measure(files, calibration, holdout, scoring)
    if largest_drop is not None:
        check_drop(reports, largest_drop, scoring.metric)
    canary = choose_canary(files, calibration, scoring)
    report = StudentReport(
        classes=tuple(classes),
        parameters=sum(p.numel() for p in module.parameters()),
        files=reports,
        parity_error=parity_error,
        calibration_images=len(calibration),
        holdout_images=0 if holdout is None else len(holdout[0]),
        tensorrt=check_tensorrt(
            files[INT8_TENSORRT],
            {IMAGES: (_TENSORRT_BATCH, *calibration.shape[1:])},
            installed_tensorrt(),
        ),
        metric=scoring.metric,
        software={m.__name__: str(m.__version__) for m in (np, onnx, onnxruntime, torch)},
    )
    return StudentFiles(files, report, canary)


def require_exportable(
    module: nn.Module, given: InputSpec, classes: int, *, scoring: Scoring = TOP_1
) -> None:
    """Whether a student of this form can become a file at all; its weights do not matter.

    For before the training, which takes long. Arguments as for `export_student`. Raises UsageError or
    CheckFailed as it would.
    """
    module = copy.deepcopy(module).to("cpu", torch.float32).eval()
    model = take_uint8_images(_to_onnx(module, given, classes, scoring.dimensions), given)
    session = OnnxClassifier(model.SerializeToString())
    session.logits(np.zeros((2, *given.size, 3), np.uint8))


def _to_onnx(module: nn.Module, given: InputSpec, classes: int, dimensions: int) -> onnx.ModelProto:
    """The bare network: float[N, 3, h, w] -> logits float[N, classes, …], no trace of its source."""
    rest = given.size if dimensions == 4 else ()
    for count in (3, 2):
        # Never one: torch.export takes an example of one as proof that the batch always is.
        example = torch.zeros(count, 3, *given.size)
        try:
            with torch.inference_mode():
                shape = tuple(module(example).shape)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the student cannot answer {count} images of {list(example.shape[1:])} ({error}): "
                "give the size it was trained with and a module that takes one float [N, 3, h, w]"
            ) from error
        if shape != (count, classes, *rest):
            raise UsageError(
                f"the student answers {count} images with a tensor of shape {shape}, which is not "
                f"{(count, classes, *rest)}: give one class name per logit and a module ending in logits"
            )
    model = torch_to_onnx(module, (3, *given.size), ["logits"])
    _strip_traces(model)
    return model


def _strip_traces(model: onnx.ModelProto) -> None:
    """Drop what torch writes beside the graph: class names, stack traces with local paths."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _measure(
    files: dict[str, bytes],
    calibration: NDArray[np.uint8],
    holdout: tuple[NDArray[np.uint8], NDArray[Any]] | None,
    scoring: Scoring,
) -> dict[str, FileReport]:
    images, labels = (calibration, None) if holdout is None else holdout
    sessions = {name: OnnxClassifier(model) for name, model in files.items()}
    kept: dict[str, list[NDArray[Any]]] = {name: [] for name in files}
    alike, every = dict.fromkeys(files, 0), 0
    # By batch: a dense student's logits of the whole holdout may be larger than the memory.
    for start in range(0, len(images), _BATCH):
        logits = {n: s.logits(images[start : start + _BATCH]) for n, s in sessions.items()}
        reference = decisions(logits[FP32], scoring.decision)
        every += reference.size
        for name, answer in logits.items():
            alike[name] += int((decisions(answer, scoring.decision) == reference).sum())
            if labels is not None:
                kept[name].append(scoring.kept(answer))
    return {
        name: FileReport(
            bytes=len(files[name]),
            accuracy=None
            if labels is None
            else scoring.measure(np.concatenate(kept[name]), labels),
            agreement=alike[name] / every,
        )
        for name in files
    }


def check_drop(
    reports: dict[str, FileReport], largest_drop: float, metric: str = TOP_1.metric
) -> None:
    """The quality gate: CheckFailed if a file's accuracy is too far under the FP32 file's.

    Without accuracies (no holdout) there is nothing to compare, and nothing is refused.
    """
    best = reports[FP32].accuracy
    named = metric.replace("_", " ")
    for name, report in reports.items():
        if best is None or report.accuracy is None or best - report.accuracy <= largest_drop:
            continue
        raise CheckFailed(
            f"{name} has {report.accuracy:.1%} {named} on the holdout and FP32 {best:.1%}: a "
            f"drop of more than {largest_drop:.1%}; calibrate on more images, or deploy {FP32}"
        )


def _check_images(what: str, images: NDArray[np.uint8]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise UsageError(
            f"the {what} images are {images.dtype}{list(images.shape)}, not uint8[N, H, W, 3] with "
            "N at least 1: give RGB images of one size, not normalised"
        )


def _check_holdout(
    images: NDArray[np.uint8], labels: NDArray[Any], classes: int, scoring: Scoring
) -> None:
    _check_images("holdout", images)
    if scoring is not TOP_1:
        return
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"the holdout has {len(images)} images and labels {labels.dtype}{list(labels.shape)}: "
            "give one whole number per image"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(
            f"the holdout has labels from {labels.min()} to {labels.max()}, outside 0 to "
            f"{classes - 1}: give class indices in the order of the class names"
        )
