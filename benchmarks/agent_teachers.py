"""The teachers the agent is measured with: the demo's, and a larger one that is made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from torch import nn

from benchmarks.saliency import find_tap
from benchmarks.saliency_nets import Classifier, Residual, conv, export_onnx
from edge_teacher import bundle as bundles
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract.messages import TapInfo, TeacherInfo
from export.graph import InputSpec, build_teacher_graph, prepare
from export.graph.network import session

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "teachers"
LARGE_SIDE = 64


def demo(index: int) -> tuple[Path, Path]:
    """(bundle, owner's key)."""
    return EXAMPLES / f"teacher-{index}.fedsa", EXAMPLES / "owner.pub"


def large_network() -> nn.Module:
    """A residual network of 2.8 M parameters at 64 x 64, with random weights: time does not ask for others."""
    torch.manual_seed(0)
    return Classifier(
        conv(3, 32),
        Residual(32, 64, 2),
        Residual(64, 128, 2),
        Residual(128, 256, 2),
        Residual(256, 256),
        channels=256,
    ).eval()


def large(folder: Path) -> tuple[Path, Path]:
    """The same of a network some ten times as heavy as a demo's; made in `folder`."""
    net = large_network()
    model = export_onnx(net)
    spec = InputSpec(size=(LARGE_SIDE, LARGE_SIDE))
    tap = find_tap(prepare(model, spec), net, torch.rand(2, 3, LARGE_SIDE, LARGE_SIDE))
    graph: onnx.ModelProto = build_teacher_graph(model, spec, taps={"last": tap})
    found = session(graph).run(
        ["saliency", "features.last"],
        {"images": np.zeros((1, LARGE_SIDE, LARGE_SIDE, 3), np.uint8)},
    )
    info = TeacherInfo(
        name="large",
        version=1,
        input_size=(LARGE_SIDE, LARGE_SIDE),
        taps={"last": TapInfo(*found[1].shape[1:])},
        saliency_tap="last",
        saliency_size=found[0].shape[1:],
        saliency_kind="gradcam",
    )
    key = Ed25519PrivateKey.generate()
    bundle, owner = folder / "large.fedsa", folder / "large.pub"
    bundles.write(
        bundle, TeacherCard(teacher=info), {"teacher.onnx": graph.SerializeToString()}, key
    )
    owner.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return bundle, owner
