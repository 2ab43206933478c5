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

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from edge_teacher.contract.errors import CheckFailed, UsageError
from export.checks.student import (
    Canary,
    OnnxClassifier,
    accuracy,
    check_parity,
    choose_canary,
)
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
]

FP32 = "student.fp32.onnx"
INT8_CPU = "student.int8.cpu.onnx"
INT8_TENSORRT = "student.int8.tensorrt.onnx"
# The upper end of the profile TensorRT is asked with; the device builds its engine with its own.
_TENSORRT_BATCH = 32


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
    holdout: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None,
    *,
    largest_drop: float | None = None,
) -> StudentFiles:
    """Export a trained classifier, quantise it, and check that it still is the same classifier.

    Args:
        module: float[N, 3, h, w] normalised -> logits float[N, classes]. Neither changed nor moved.
        given: the size and normalisation the module was trained with.
        classes: names in the order of the logits.
        calibration: uint8[N, H, W, 3], images like those the device will see; labels are not
            needed.
        holdout: images uint8[N, H, W, 3] and labels int[N] to measure accuracy on.
        largest_drop: refuse an INT8 file whose holdout accuracy is more than this fraction under
            FP32's.

    Raises:
        UsageError: the arrays, the classes or the module do not fit together.
        CheckFailed: the exported file does not compute what the module does, or an INT8 file lost
            too much.
    """
    _check_images("calibration", calibration)
    if holdout is not None:
        _check_holdout(*holdout, len(classes))
    if largest_drop is not None and holdout is None:
        raise UsageError(
            "largest_drop needs a labelled holdout to measure the drop on: give holdout="
        )
    module = copy.deepcopy(module).to("cpu", torch.float32).eval()
    fp32 = take_uint8_images(_to_onnx(module, given, len(classes)), given)
    models = {
        FP32: fp32,
        INT8_CPU: quantise(fp32, calibration, Dialect.CPU),
        INT8_TENSORRT: quantise(fp32, calibration, Dialect.TENSORRT),
    }
    files = {name: model.SerializeToString(deterministic=True) for name, model in models.items()}
    parity_error = check_parity(module, given, files[FP32])
    reports = _measure(files, calibration, holdout)
    if largest_drop is not None:
        check_drop(reports, largest_drop)
    canary = choose_canary(files, calibration)
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
        software={m.__name__: str(m.__version__) for m in (np, onnx, onnxruntime, torch)},
    )
    return StudentFiles(files, report, canary)


def _to_onnx(module: nn.Module, given: InputSpec, classes: int) -> onnx.ModelProto:
    """The bare network: float[N, 3, h, w] -> logits float[N, classes], no trace of its source."""
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
        if shape != (count, classes):
            raise UsageError(
                f"the student answers {count} images with a tensor of shape {shape}, which is not "
                f"({count}, {classes}): give one class name per logit and a module ending in logits"
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
    holdout: tuple[NDArray[np.uint8], NDArray[np.int64]] | None,
) -> dict[str, FileReport]:
    images, labels = (calibration, None) if holdout is None else holdout
    logits = {name: OnnxClassifier(model).logits(images) for name, model in files.items()}
    reference = logits[FP32].argmax(1)
    return {
        name: FileReport(
            bytes=len(files[name]),
            accuracy=None if labels is None else accuracy(answer, labels),
            agreement=accuracy(answer, reference),
        )
        for name, answer in logits.items()
    }


def check_drop(reports: dict[str, FileReport], largest_drop: float) -> None:
    """The quality gate: CheckFailed if a file's accuracy is too far under the FP32 file's.

    Without accuracies (no holdout) there is nothing to compare, and nothing is refused.
    """
    best = reports[FP32].accuracy
    for name, report in reports.items():
        if best is None or report.accuracy is None or best - report.accuracy <= largest_drop:
            continue
        raise CheckFailed(
            f"{name} is right on {report.accuracy:.1%} of the holdout and FP32 on {best:.1%}: a "
            f"drop of more than {largest_drop:.1%}; calibrate on more images, or deploy {FP32}"
        )


def _check_images(what: str, images: NDArray[np.uint8]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise UsageError(
            f"the {what} images are {images.dtype}{list(images.shape)}, not uint8[N, H, W, 3] with "
            "N at least 1: give RGB images of one size, not normalised"
        )


def _check_holdout(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int) -> None:
    _check_images("holdout", images)
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
