"""Does an exported student still say what the trained one says?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from edge_teacher.contract.errors import CheckFailed
from export.graph import InputSpec
from export.input_graph import IMAGES

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

# Of the largest logit. Single precision and fused batch normalisation leave about 1e-6.
PARITY_TOLERANCE = 1e-4
CANARY_IMAGES = 8
_CANARY_CANDIDATES = 96
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
        """images [N, H, W, 3] -> [N, classes]."""
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        return np.concatenate([self._session.run(None, {IMAGES: batch})[0] for batch in batches])


@dataclass(frozen=True)
class Canary:
    """A few images with the answers each file must give; what a device proves a new student with.

    Attributes:
        images: uint8[n, H, W, 3].
        top1: int64[n], the class index that all files answer.
        logits: for each file, float32[n, classes] as ONNX Runtime answered on the CPU.
        tolerance: for each file, by how much a logit may differ on another device. Every image's
            winning logit leads by more than twice this, so an answer within tolerance has the same
            top-1.
    """

    images: Images
    top1: NDArray[np.int64]
    logits: dict[str, Logits]
    tolerance: dict[str, float]


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


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """The fraction of rows whose largest logit is at the label."""
    return float((logits.argmax(1) == labels).mean())


def choose_canary(models: dict[str, bytes], images: Images) -> Canary:
    """Of the first images, those on which all files agree most clearly; one per class if it can.

    The tolerance of a file is four times what changes between ONNX Runtime's fused kernels and the
    same nodes one by one (the rounding that differs between devices), at least 2 % of the spread of
    its logits.

    Raises:
        CheckFailed: there is no image on which all files give the same answer with enough margin.
    """
    images = images[:_CANARY_CANDIDATES]
    logits = {name: OnnxClassifier(model).logits(images) for name, model in models.items()}
    top1 = next(iter(logits.values())).argmax(1)
    clear = np.ones(len(images), bool)
    margin = np.full(len(images), np.inf)
    tolerance = {}
    for name, answer in logits.items():
        unfused = OnnxClassifier(models[name], fused=False).logits(images)
        rounding = float(np.abs(answer - unfused).max())
        tolerance[name] = max(4 * rounding, 0.02 * float(np.ptp(answer)))
        ordered = np.sort(answer, axis=1)
        lead = (ordered[:, -1] - ordered[:, -2]) / (2 * tolerance[name])
        clear &= (answer.argmax(1) == top1) & (lead > 1)
        margin = np.minimum(margin, lead)
    if not clear.any():
        raise CheckFailed(
            f"on none of {len(images)} images do {', '.join(models)} clearly agree: quantisation "
            "destroyed this student; calibrate on more typical images or deploy the FP32 file"
        )
    by_margin = [int(i) for i in np.argsort(-margin) if clear[i]]
    first_of_class = list({int(top1[i]): i for i in reversed(by_margin)}.values())
    ranked = sorted(first_of_class, key=by_margin.index) + by_margin
    chosen = np.array(list(dict.fromkeys(ranked))[:CANARY_IMAGES])
    return Canary(
        images=images[chosen].copy(),
        top1=top1[chosen],
        logits={name: answer[chosen] for name, answer in logits.items()},
        tolerance=tolerance,
    )
