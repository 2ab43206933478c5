"""A torch module and its manifest to a signed, checked bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_teacher import bundle as bundles
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.keys import private_key_at
from edge_teacher.runtime import OnnxRuntimeSession
from export import teacher as teachers
from export.checks.torch_teacher import TorchTeacher
from export.teacher import check, export_teacher, load_module, read_manifest
from tests.examples import write_manifest


def test_the_bundle_answers_as_torch_does_for_any_number_and_size_of_images(tmp_path: Path) -> None:
    manifest_path = write_manifest(tmp_path, "a", size=24)
    key = private_key_at(tmp_path / "owner.key")
    export_teacher(manifest_path, tmp_path / "a.fedsa", key)
    bundle = bundles.read(tmp_path / "a.fedsa", [key.public_key()])
    card = bundle.card
    assert isinstance(card, bundles.TeacherCard)
    assert card.teacher.input_size == (24, 24)
    assert card.teacher.saliency_size == (6, 6)
    assert not card.teacher.gives_logits
    session = OnnxRuntimeSession(bundle.file(card.graph), threads=1)
    assert set(session.outputs) == {"features.last", "saliency"}

    manifest = read_manifest(manifest_path)
    reference = TorchTeacher(load_module(manifest, tmp_path), manifest.input, manifest.taps, "last")
    rng = np.random.default_rng(0)
    for shape in ((1, 24, 24, 3), (5, 40, 31, 3), (3, 17, 24, 3)):
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        expected = reference.answer(images)
        found = session.run(images, session.outputs)
        for name, want in expected.items():
            np.testing.assert_allclose(found[name], want, atol=2e-5 * np.abs(want).max())
        assert found["saliency"].min() >= 0
        assert found["saliency"].max() <= 1


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "a")
    key = private_key_at(tmp_path / "owner.key")
    export_teacher(manifest, tmp_path / "one.fedsa", key)
    export_teacher(manifest, tmp_path / "two.fedsa", key)
    assert (tmp_path / "one.fedsa").read_bytes() == (tmp_path / "two.fedsa").read_bytes()


def test_the_bundle_does_not_say_where_the_owner_keeps_the_source(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "a")
    export_teacher(manifest, tmp_path / "a.fedsa", private_key_at(tmp_path / "owner.key"))
    content = (tmp_path / "a.fedsa").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"net.py" not in content


def test_a_graph_that_is_not_the_network_is_refused(tmp_path: Path) -> None:
    manifest_path = write_manifest(tmp_path, "a")
    manifest = read_manifest(manifest_path)
    module = load_module(manifest, tmp_path)
    session = OnnxRuntimeSession(
        teachers.teacher_graph(module, manifest).SerializeToString(), threads=1
    )
    images = teachers.check_images(manifest.input.size)
    found = dict(session.run(images, session.outputs))
    assert check(module, manifest, images, found).saliency_error < teachers.TOLERANCE
    with torch.no_grad():
        next(module.parameters()).mul_(1.001)
    with pytest.raises(CheckFailed, match="deviates from torch"):
        check(module, manifest, images, found)
    found["saliency"] = np.full_like(found["saliency"], np.nan)
    with pytest.raises(CheckFailed, match="saliency"):
        check(load_module(manifest, tmp_path), manifest, images, found)


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
        export_teacher(path, tmp_path / "a.fedsa", private_key_at(tmp_path / "owner.key"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.fedsa").exists()
