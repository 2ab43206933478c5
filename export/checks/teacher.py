"""Everything a teacher graph is held to before it is signed, and the report that travels with it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edge_teacher.contract.errors import CheckFailed
from export.checks.autograd import UnknownOperator
from export.checks.fp16 import HalfReport, NoHalfCopy, check_half, to_half
from export.checks.parity import (
    BatchReport,
    DerivativeReport,
    check_batches,
    check_derivative,
    require,
)
from export.checks.reference import Answers, OfModule, OfNetwork, expected
from export.checks.tensorrt import TensorRtVerdict, check_tensorrt, installed_tensorrt
from export.graph import InputSpec, prepare
from export.graph.build import network_and_logits
from export.graph.layout import layout_of
from export.graph.network import session
from export.graph.target import settle
from export.inspect import count_parameters
from export.manifest import Manifest

TOLERANCE = 1e-4
"""Largest deviation of any image's features or saliency from float64, relative to that image's largest
value. The graph itself computes in float32."""
LARGEST_BATCH = 8  # of the optimisation profile that TensorRT is asked to build


class TeacherReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked at export; travels in the bundle as report.json. Errors are relative, worst image."""

    kind: str
    parameters: int
    images: int
    photographs: bool
    """Whether the images were the owner's photographs, or generated ones."""
    derivative: DerivativeReport | None
    """None for Eigen-CAM, which has no derivative."""
    feature_error: float | None
    """Of the features against float64; None where the judge lacks an operator."""
    saliency_error: float | None
    batches: BatchReport
    half: HalfReport | None
    tensorrt: TensorRtVerdict
    warnings: tuple[str, ...]
    """What passes and should be known: half precision that does not agree, checks that could not be made."""
    software: dict[str, str]


def check_teacher(
    graph: onnx.ModelProto,
    network: onnx.ModelProto,
    manifest: Manifest,
    tensors: Mapping[str, str],
    images: NDArray[np.uint8],
    *,
    logits: str | None,
    photographs: bool,
    module: nn.Module | None = None,
) -> TeacherReport:
    """Hold the teacher `graph` against the `network` it was made of, and against `module` if there is one.

    tensors: {tap: tensor of `network`}; logits: its class scores (None: found); images uint8[N, H, W, 3].
    Raises CheckFailed if the graph must not be served: wrong features, maps or derivative, maps that depend on
    the batch or are all the same.
    """
    warnings = []
    derivative = None
    if manifest.kind != "eigencam":
        derivative = check_derivative(
            network,
            manifest.input,
            images,
            wrt=tensors[manifest.saliency_at] if manifest.kind == "gradcam" else None,
            logits=logits,
            target=manifest.target,
        )
        if derivative.judge != "float64 autograd":
            warnings.append(
                "the float64 judge lacks an operator of this network, so its derivative was judged by "
                "directional differences, which are coarser"
            )
    errors = _errors(graph, network, manifest, tensors, logits, images, module)
    batches = check_batches(graph, images)
    require(derivative, batches)
    if batches.flat_maps:
        warnings.append(
            f"{batches.flat_maps} of {len(images)} images have a flat saliency map, which says nothing; "
            "an earlier tap may serve better"
        )
    half, trouble = _half(graph, images, manifest.input)
    warnings += trouble
    if not photographs:
        warnings.append(
            "all was checked on generated images; name photographs like the ones it will be asked about"
        )
    verdict = check_tensorrt(
        graph.SerializeToString(), _largest(manifest.input), installed_tensorrt()
    )
    if verdict.accepted is False:
        warnings.append(f"TensorRT does not take this graph: {verdict.detail}")
    return TeacherReport(
        kind=manifest.kind,
        parameters=count_parameters(prepare(network, manifest.input)),
        images=len(images),
        photographs=photographs,
        derivative=derivative,
        feature_error=max((e for name, e in errors.items() if name != "saliency"), default=None),
        saliency_error=errors.get("saliency"),
        batches=batches,
        half=half,
        tensorrt=verdict,
        warnings=tuple(warnings),
        software={"torch": str(torch.__version__), "onnx": onnx.__version__},
    )


def _half(
    graph: onnx.ModelProto, images: NDArray[np.uint8], spec: InputSpec
) -> tuple[HalfReport | None, list[str]]:
    """(the report, or None where there can be no such copy; what the owner should know)."""
    try:
        report = check_half(graph, images)
    except NoHalfCopy as error:
        return None, [str(error)]
    if report.agrees:
        verdict = check_tensorrt(
            to_half(graph).SerializeToString(), _largest(spec), installed_tensorrt()
        )
        report = msgspec.structs.replace(report, tensorrt=verdict)
    return report, [report.warning] if report.warning else []


def _errors(
    graph: onnx.ModelProto,
    network: onnx.ModelProto,
    manifest: Manifest,
    tensors: Mapping[str, str],
    logits: str | None,
    images: NDArray[np.uint8],
    module: nn.Module | None,
) -> dict[str, float]:
    """{output: error against float64}; empty where the judge lacks an operator. Raises CheckFailed."""
    measured, scores = network_and_logits(
        network,
        manifest.input,
        list(tensors.values()),
        logits,
        needed=manifest.kind != "eigencam",
    )
    layouts = {
        name: layout_of(measured, tensor, manifest.input.size)
        for name, tensor in tensors.items()
        if name != manifest.saliency_at or manifest.layout is None
    }
    if manifest.layout is not None:
        layouts[manifest.saliency_at] = manifest.layout
    target = settle(measured, scores, manifest.target) if scores else manifest.target
    answers: Answers = (
        OfNetwork(measured, scores, tensors) if module is None else OfModule(module, manifest.taps)
    )
    try:
        wanted = expected(
            answers,
            images,
            manifest.input,
            tap=manifest.saliency_at,
            kind=manifest.kind,
            target=target,
            layouts=layouts,
        )
    except UnknownOperator:
        return {}
    names = list(wanted)
    found = dict(zip(names, session(graph).run(names, {"images": images}), strict=True))
    errors = {name: deviation(found[name], want) for name, want in wanted.items()}
    for name, error in errors.items():
        # Not `error > TOLERANCE`: a NaN must fail too.
        if not error <= TOLERANCE:
            raise CheckFailed(
                f"the graph of {manifest.name!r} deviates from float64 by {error:.2g} in {name} "
                f"(allowed {TOLERANCE:g}); this network must not be served"
            )
    return errors


def deviation(found: NDArray[np.float32], want: NDArray[np.float64]) -> float:
    """The worst image's largest deviation, relative to its largest value; NaN if anything is."""
    if found.shape != want.shape:
        return float("inf")
    axes = tuple(range(1, want.ndim))
    scale = np.maximum(np.abs(want).max(axis=axes), 1e-12)
    return float(np.max(np.abs(found - want).max(axis=axes) / scale))


def _largest(spec: InputSpec) -> dict[str, tuple[int, ...]]:
    return {"images": (LARGEST_BATCH, *spec.size, 3)}
