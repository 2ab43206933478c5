"""What was measured while a student was exported; readable without torch."""

from __future__ import annotations

import msgspec

from export.checks.tensorrt import TensorRtVerdict


class FileReport(msgspec.Struct, frozen=True):
    """One ONNX file.

    Attributes:
        bytes: of the file.
        accuracy: the student's metric on the labelled holdout (for a classifier the fraction right), by
            ONNX Runtime on the CPU; None without one.
        agreement: fraction of its decisions (the top-1 of each image or pixel, or each label) that are
            the FP32 file's, on the holdout, or on the calibration images where there is none.
    """

    bytes: int
    accuracy: float | None
    agreement: float


class StudentReport(msgspec.Struct, frozen=True):
    """What was measured while exporting; travels in the bundle as report.json.

    Attributes:
        files: by file name.
        parity_error: of the FP32 file against torch in float64, as a fraction of the largest logit.
        calibration_images, holdout_images: how many were used.
        tensorrt: what TensorRT's parser and builder said about the file written for it.
        software: version by package.
        metric: what the accuracies are.
    """

    classes: tuple[str, ...]
    parameters: int
    files: dict[str, FileReport]
    parity_error: float
    calibration_images: int
    holdout_images: int
    tensorrt: TensorRtVerdict
    software: dict[str, str]
    metric: str = "accuracy"
