"""A torch module and its manifest to a signed, checked bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_teacher import bundle as bundles
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.keys import private_key_at
from edge_teacher.runtime import OnnxRuntimeSession
from edge_teacher.runtime.bundled import teacher_model
from edge_teacher.runtime.trial import difference
from export.checks.fp16 import HalfReport
from export.checks.reference import OfModule, expected
from export.checks.teacher import TOLERANCE, TeacherReport, check_teacher
from export.checks.tensorrt import TensorRtVerdict
from export.graph import InputSpec, MapLayout
from export.manifest import Manifest, read_manifest
from export.teacher import (
    export_teacher,
    generated_images,
    load_module,
    load_source,
    source_of,
    teacher_graph,
)
from tests.examples import export_at, write_manifest
from tests.export.graph.zoo import SIZE, make


def judged(manifest: Manifest, module: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    return expected(
        OfModule(module, manifest.taps),
        images,
        manifest.input,
        tap=manifest.saliency_at,
        kind=manifest.kind,
        target=manifest.target,
        layouts={"last": MapLayout("NCHW", (6, 6))},
    )


def test_the_bundle_answers_as_torch_does_for_any_number_and_size_of_images(tmp_path: Path) -> None:
    manifest_path = write_manifest(tmp_path, "a", size=24)
    key = private_key_at(tmp_path / "owner.key")
    export_at(manifest_path, tmp_path / "a.fedsa", key)
    bundle = bundles.read(tmp_path / "a.fedsa", [key.public_key()])
    card = bundle.card
    assert isinstance(card, bundles.TeacherCard)
    assert card.teacher.input_size == (24, 24)
    assert card.teacher.saliency_size == (6, 6)
    assert not card.teacher.gives_logits
    session = OnnxRuntimeSession(bundle.file(card.graph), threads=1)
    assert set(session.outputs) == {"features.last", "saliency"}

    manifest = read_manifest(manifest_path)
    module = load_module(manifest, tmp_path)
    rng = np.random.default_rng(0)
    for shape in ((1, 24, 24, 3), (5, 40, 31, 3), (3, 17, 24, 3)):
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        wanted = judged(manifest, module, images)
        found = session.run(images, session.outputs)
        for name, want in wanted.items():
            np.testing.assert_allclose(found[name], want, atol=2e-5 * np.abs(want).max())
        assert found["saliency"].min() >= 0
        assert found["saliency"].max() <= 1


class TestWhatElseTravels:
    def carried(self, folder: Path, extra: str, **options: np.ndarray) -> bundles.Bundle:
        manifest = write_manifest(folder, "a", size=24)
        manifest.write_text(extra + manifest.read_text())
        key = private_key_at(folder / "owner.key")
        return export_teacher(
            read_manifest(manifest), manifest.parent, folder / "a.fedsa", key, **options
        )

    def test_a_copy_in_half_precision_answers_nearly_the_same(self, tmp_path: Path) -> None:
        bundle = self.carried(tmp_path, "")
        model = teacher_model(bundle)
        images = generated_images((24, 24))
        single, half = (
            OnnxRuntimeSession(model.graphs[dialect], threads=1) for dialect in ("fp32", "fp16")
        )
        found = difference(
            half.run(images, single.outputs), single.run(images, single.outputs), "fp16"
        )
        assert found.problem == ""
        assert found.largest > 0  # it is another graph
        written = onnx.load_from_string(model.graphs["fp16"])
        onnx.checker.check_model(written)  # also that its nodes are in order
        assert onnx.TensorProto.FLOAT16 in {t.data_type for t in written.graph.initializer}

    def test_no_copy_where_the_owner_wants_none(self, tmp_path: Path) -> None:
        bundle = self.carried(tmp_path, "half = false\n")
        assert set(bundle.files) == {"teacher.onnx", "report.json"}

    def test_no_copy_that_tensorrt_refuses_or_whose_maps_do_not_agree(self) -> None:
        report = HalfReport(8, 0, 0.999, 0.999, 100)
        verdict = TensorRtVerdict(True, False, "rtx", "no Conv")
        refused = msgspec.structs.replace(report, tensorrt=verdict)
        assert (report.usable, refused.usable) == (True, False)
        assert refused.warning == "TensorRT does not take the copy in half precision: no Conv"
        assert not msgspec.structs.replace(report, worst_cosine=0.9).usable

    def test_photographs_travel_only_if_the_owner_says_so(self, tmp_path: Path) -> None:
        photographs = generated_images((30, 30), count=9)
        kept = self.carried(tmp_path, "", photographs=photographs)
        assert "probe.images.npy" not in kept.files
        given = self.carried(tmp_path, "publish_probe = true\n", photographs=photographs)
        assert np.array_equal(teacher_model(given).images(), photographs[:8])
        with pytest.raises(UsageError, match="publish_probe"):
            self.carried(tmp_path, "publish_probe = true\n")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "a")
    key = private_key_at(tmp_path / "owner.key")
    export_at(manifest, tmp_path / "one.fedsa", key)
    export_at(manifest, tmp_path / "two.fedsa", key)
    assert (tmp_path / "one.fedsa").read_bytes() == (tmp_path / "two.fedsa").read_bytes()


def test_the_bundle_does_not_say_where_the_owner_keeps_the_source(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "a")
    export_at(manifest, tmp_path / "a.fedsa", private_key_at(tmp_path / "owner.key"))
    content = (tmp_path / "a.fedsa").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"net.py" not in content


def test_a_graph_that_is_not_the_network_is_refused(tmp_path: Path) -> None:
    manifest_path = write_manifest(tmp_path, "a")
    manifest = read_manifest(manifest_path)
    source = load_source(manifest, tmp_path)
    graph = teacher_graph(source, manifest)
    images = generated_images(manifest.input.size)

    def check(module: nn.Module) -> TeacherReport:
        return check_teacher(
            graph,
            source.model,
            manifest,
            source.tensors,
            images,
            logits=source.logits,
            photographs=False,
            module=module,
        )

    report = check(load_module(manifest, tmp_path))
    assert report.saliency_error is not None
    assert report.saliency_error < TOLERANCE
    for change in (1.001, float("nan")):
        other = load_module(manifest, tmp_path)
        with torch.no_grad():
            next(other.parameters()).mul_(change)
        with pytest.raises(CheckFailed, match="deviates from float64"):
            check(other)


@pytest.mark.parametrize("name", ["vit", "swin", "unet", "fpn"])
def test_tokens_dense_heads_and_channels_last_look_like_any_other_teacher(name: str) -> None:
    manifest = Manifest(
        name=name,
        input=InputSpec(size=SIZE, mean=(0.5,), std=(0.25,)),
        taps={"last": "tap"},
        module="zoo.py:net",
        weights="zoo.pt",
    )
    source = source_of(make(name, trained=True), manifest)
    graph = teacher_graph(source, manifest)
    report = check_teacher(
        graph,
        source.model,
        manifest,
        source.tensors,
        generated_images(SIZE),
        logits=source.logits,
        photographs=False,
        module=source.module,
    )
    assert report.derivative is not None
    assert report.derivative.passed
    assert report.feature_error is not None
    features, saliency = (
        tuple(d.dim_value for d in out.type.tensor_type.shape.dim[1:]) for out in graph.graph.output
    )
    assert features[1:] == saliency


def test_a_part_that_gives_no_tensor_is_said(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)[0].mean((2, 3))

    manifest = read_manifest(write_manifest(tmp_path, "a"))
    manifest = msgspec.structs.replace(manifest, taps={"last": "pair"})
    with pytest.raises(UsageError, match="tap 'last' of 'teacher-a' gives tuple, no tensor"):
        source_of(Net().eval(), manifest)
    with pytest.raises(UsageError, match="does not run on float32"):
        source_of(
            nn.Sequential(nn.Linear(7, 5)), msgspec.structs.replace(manifest, taps={"l": "0"})
        )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[taps]", "[tips]", "tips"),
        ('module = "net.py:net"', 'module = "absent.py:net"', "absent.py"),
        ('module = "net.py:net"', 'module = "net.py:other"', "other"),
        ("width = 8", "width = 9", "cannot be loaded"),
        ('weights = "a.pt"', 'weights = "b.pt"', "b.pt"),
        ('last = "3"', 'last = "30"', "'30'"),
        ("size = [32, 32]", "size = [32]", "size"),
        ("std = [0.25, 0.25, 0.25]", "std = [0.0, 0.25, 0.25]", "std"),
        ("[input]", "input", "TOML|cannot be used"),
    ],
)
def test_a_wrong_manifest_is_one_sentence(
    tmp_path: Path, before: str, after: str, words: str
) -> None:
    path = write_manifest(tmp_path, "a")
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(UsageError, match=words) as caught:
        export_at(path, tmp_path / "a.fedsa", private_key_at(tmp_path / "owner.key"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.fedsa").exists()
