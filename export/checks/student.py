"""Does an exported student still say what the trained one says?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from edge_teacher.contract.decisions import decisions
from edge_teacher.contract.errors import CheckFailed
from export.checks.scoring import TOP_1, Scoring
from export.graph import InputSpec
from export.input_graph import IMAGES

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

# Of the largest logit. Single precision and fused batch normalisation leave about 1e-6.
PARITY_TOLERANCE = 1e-4
CANARY_IMAGES = 8
_CANARY_CANDIDATES = 96
# Of one file's logits for the canary batch: those of a dense student would else outweigh the student.
_CANARY_BYTES = 1 << 20
# Of one file's logits while candidates are compared.
_CANDIDATE_BYTES = 64 << 20
_LEAST_CERTAIN = 0.5
_BATCH = 64


class OnnxClassifier:
    """One ONNX file in ONNX Runtime on one CPU thread.

    Args:
        model: a serialised file with input `images` and one output.
        fused: False keeps every node as written, so Q/DQ pairs are computed in float and not by
            INT8 kernels.
    """

    def __init__(self, model: bytes, *, fused: bool = True) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def logits(self, images: Images) -> Logits:
        """images [N, H, W, 3] -> [N, classes], or [N, classes, h, w]."""
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        return np.concatenate([self._session.run(None, {IMAGES: batch})[0] for batch in batches])


@dataclass(frozen=True)
class Canary:
    """A few images with the answers each file must give; what a device proves a new student with.

    Attributes:
        images: uint8[n, H, W, 3].
        answers: the decisions of the FP32 file: for a classifier int64[n], the class index.
        logits: for each file, float32[n, classes, …] as ONNX Runtime answered on the CPU.
        tolerance: for each file, by how much a logit may differ on another device.
        certain: share of decisions on which all files agree and which no difference within tolerance
            changes. Of a classifier all are.
    """

    images: Images
    answers: NDArray[Any]
    logits: dict[str, Logits]
    tolerance: dict[str, float]
    certain: float


def check_parity(module: nn.Module, given: InputSpec, model: bytes) -> float:
    """How far the FP32 file is from torch in float64, as a fraction of the largest logit.

    Asked on random pixels at the network's own size, larger, smaller and oblong, and at several
    batch sizes: resizing, normalisation and the dynamic axes are all in it.

    Raises:
        CheckFailed: the deviation is above `PARITY_TOLERANCE`.
    """
    reference = copy.deepcopy(module).double()
    mean = torch.tensor(given.mean, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(given.std, dtype=torch.float64).view(1, 3, 1, 1)
    exported = OnnxClassifier(model)
    height, width = given.size
    random = np.random.default_rng(0)
    worst = 0.0
    for shape in (
        (3, height, width),
        (1, 2 * height + 1, width + 5),
        (2, max(1, height // 2), max(1, width - 3)),
    ):
        images = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
        with torch.inference_mode():
            resized = F.interpolate(pixels, given.size, mode="bilinear", align_corners=False)
            expected = reference((resized / 255 - mean) / std).numpy()
        error = np.abs(exported.logits(images) - expected).max() / max(np.abs(expected).max(), 1e-6)
        # Not `error > tolerance`: a NaN must fail too.
        if not error <= PARITY_TOLERANCE:
            raise CheckFailed(
                f"student.fp32.onnx differs from the trained student by {error:.1e} of the largest "
                f"logit on images of {shape[1]}x{shape[2]} (allowed {PARITY_TOLERANCE:.0e}): this "
                "network does not survive the export to ONNX and must not be deployed"
            )
        worst = max(worst, float(error))
    return worst


def choose_canary(models: dict[str, bytes], images: Images, scoring: Scoring = TOP_1) -> Canary:
    """Of the first images, those on which all files agree most clearly; one per class if it can.

    The tolerance of a file is four times what changes between ONNX Runtime's fused kernels and the
    same nodes one by one (the rounding that differs between devices), at least 2 % of the spread of
    its logits.

    Raises:
        CheckFailed: there is no image on which all files give the same answer with enough margin; where
            an image has many answers (pixels, labels), to half of them.
    """
    one = OnnxClassifier(next(iter(models.values()))).logits(images[:1]).nbytes
    images = images[: max(1, min(_CANARY_CANDIDATES, _CANDIDATE_BYTES // one))]
    logits = {name: OnnxClassifier(model).logits(images) for name, model in models.items()}
    reference = next(iter(logits.values()))
    answers = decisions(reference, scoring.decision)
    certain = np.ones(answers.shape, bool)
    margin = np.full(answers.shape, np.inf)
    tolerance = {}
    for name, found in logits.items():
        unfused = OnnxClassifier(models[name], fused=False).logits(images)
        rounding = float(np.abs(found - unfused).max())
        tolerance[name] = max(4 * rounding, 0.02 * float(np.ptp(found)))
        lead = _lead(found, scoring) / tolerance[name]
        certain &= (decisions(found, scoring.decision) == answers) & (lead > 1)
        margin = np.minimum(margin, lead)
    share = certain.reshape(len(images), -1).mean(1)
    least = margin.reshape(len(images), -1).min(1)
    clear = share >= (1 if answers.ndim == 1 else _LEAST_CERTAIN)
    if not clear.any():
        raise CheckFailed(
            f"on none of {len(images)} images do {', '.join(models)} clearly agree: quantisation "
            "destroyed this student; calibrate on more typical images or deploy the FP32 file"
        )
    by_margin = [int(i) for i in np.lexsort((-least, -share)) if clear[i]]
    shown = reference.reshape(*reference.shape[:2], -1).mean(2).argmax(1)
    first_of_class = list({int(shown[i]): i for i in reversed(by_margin)}.values())
    ranked = sorted(first_of_class, key=by_margin.index) + by_margin
    count = max(1, min(CANARY_IMAGES, _CANARY_BYTES // one))
    chosen = np.array(list(dict.fromkeys(ranked))[:count])
    return Canary(
        images=images[chosen].copy(),
        answers=answers[chosen],
        logits={name: found[chosen] for name, found in logits.items()},
        tolerance=tolerance,
        certain=float(share[chosen].mean()),
    )


def _lead(logits: Logits, scoring: Scoring) -> NDArray[np.float32]:
    """By how much every logit may differ before a decision, in the shape of the decisions, changes."""
    if scoring.decision == "each":
        return np.abs(logits)
    ordered = np.sort(logits, axis=1)
    return np.asarray((ordered[:, -1] - ordered[:, -2]) / 2)
