"""`fedsa export` as an owner meets it, with nothing but an ONNX file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from coordinator.cli import main
from edge_teacher import bundle as bundles
from edge_teacher.keys import read_public
from edge_teacher.runtime import OnnxRuntimeSession
from export.inspect import Inspection
from export.torch_to_onnx import torch_to_onnx
from tests.examples import net, write_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "owner.onnx"
    torch.manual_seed(8)
    onnx.save(torch_to_onnx(net(8).eval(), (3, 32, 32), ["logits"]), path)
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 30), (64, 64), (33, 50)]):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def export(model: Path, out: Path, *more: object) -> int:
    return main(
        [
            *("export", "teacher", "--onnx", str(model), "--signing-key", f"{out}.key"),
            *("--out", str(out), *map(str, more)),
        ]
    )


def test_inspect_suggests_a_command_that_works(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "inspect", str(model), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Inspection)
    assert found.logits_shape == (5,)
    assert found.suggested_tap in {tap.tensor for tap in found.taps}
    assert found.without_rule == ()
    assert main(["export", "inspect", str(model)]) == 0
    assert f"run     {found.command}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    program, *arguments = found.command.split()
    assert program == "fedsa"
    assert main(arguments) == 0
    assert (tmp_path / "owner.fedsa").exists()


def test_nothing_but_the_file_is_needed(
    model: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.fedsa"
    flags = ("--mean", "0.5,0.4,0.3", "--std", "0.25", "--photographs", photographs, "--json")
    assert export(model, out, *flags) == 0
    report = msgspec.json.decode(capsys.readouterr().out)["report"]
    assert report["photographs"] is True
    assert report["images"] == 3
    assert report["derivative"]["judge"] == "float64 autograd"
    assert report["derivative"]["gradient_error"] <= 1e-5
    assert report["saliency_error"] <= 1e-4
    assert report["batches"]["maps_vary"]
    assert report["half"]["worst_cosine"] >= 0.99

    bundle = bundles.read(out, [read_public(Path(f"{out}.pub"))])
    assert isinstance(bundle.card, bundles.TeacherCard)
    assert bundle.card.teacher.name == "owner"
    assert bundle.card.teacher.saliency_kind == "gradcam"
    session = OnnxRuntimeSession(bundle.file(bundle.card.graph), threads=1)
    assert set(session.outputs) == {"features.last", "saliency"}


def test_what_can_be_said_about_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "inspect", str(model), "--json"]) == 0
    taps = msgspec.json.decode(capsys.readouterr().out, type=Inspection).taps
    out = tmp_path / "t.fedsa"
    flags = (
        *("--name", "mine", "--tap", f"early={taps[0].tensor}", "--tap", f"late={taps[-1].tensor}"),
        *("--kind", "input_gradient", "--class", 2, "--publish-logits"),
    )
    assert export(model, out, *flags) == 0
    assert "warning: all was checked on generated images" in capsys.readouterr().err
    card = bundles.read(out, [read_public(Path(f"{out}.pub"))]).card
    assert isinstance(card, bundles.TeacherCard)
    assert card.teacher.name == "mine"
    assert set(card.teacher.taps) == {"early", "late"}
    assert card.teacher.saliency_kind == "input_gradient"
    assert card.teacher.saliency_size == (32, 32)
    assert card.teacher.gives_logits


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tap", "relu"], "no NAME=TENSOR"),
        (["--tap", "last=absent"], "no tensor 'absent'"),
        (["--class", "5"], "classes 0 to 4"),
        (["--size", "64x64"], "axis 2 is 32, not 64"),
        (["--std", "0"], "not zero"),
        (["--mean", "1,2"], "mean has 2 numbers"),
        (["--logits", "absent"], "no tensor 'absent'"),
        (["--photographs", "absent"], "absent"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    out = tmp_path / "t.fedsa"
    assert export(model, out, *flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedsa: ")]
    assert len(said) == 1
    assert words in said[0]
    assert not out.exists()


def test_a_file_that_is_no_network_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    assert main(["export", "inspect", str(bad)]) == 2
    assert "is not a valid ONNX model" in capsys.readouterr().err
    assert main(["export", "inspect", str(tmp_path / "absent.onnx")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_flags_that_the_manifest_would_overrule_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, "a")
    arguments = [
        *("export", "teacher", "--manifest", str(manifest), "--signing-key", str(tmp_path / "k")),
        *("--out", str(tmp_path / "a.fedsa"), "--kind", "eigencam", "--mean", "0"),
    ]
    assert main(arguments) == 2
    assert "--mean, --kind would not be used" in capsys.readouterr().err


def test_a_manifest_may_describe_an_onnx_file(model: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "t.toml"
    manifest.write_text(
        'name = "t"\nonnx = "owner.onnx"\nkind = "eigencam"\n'
        '[input]\nsize = [32, 32]\n[taps]\nlast = "relu_1"\n'
        '[layout]\naxes = "NCHW"\nsize = [8, 8]\n'
    )
    out = tmp_path / "t.fedsa"
    arguments = ["export", "teacher", "--manifest", str(manifest), "--signing-key", f"{out}.key"]
    assert main([*arguments, "--out", str(out)]) == 0
    bundle = bundles.read(out, [read_public(Path(f"{out}.pub"))])
    assert isinstance(bundle.card, bundles.TeacherCard)
    assert bundle.card.teacher.saliency_kind == "eigencam"
    report = msgspec.json.decode(bundle.file("report.json"))
    assert report["derivative"] is None
    assert report["feature_error"] <= 1e-4
