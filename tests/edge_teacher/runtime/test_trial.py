"""What counts as the same answer, and as faster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_teacher import bundle as bundles
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime import OnnxRuntimeSession
from edge_teacher.runtime.bundled import teacher_model
from edge_teacher.runtime.model import Model, generated
from edge_teacher.runtime.trial import Trial, difference, ms_per_image, slower
from tests.edge_teacher.nets import OWNER, TEACHER, npy, pictures, teacher_graph
from tests.edge_teacher.runtime.shipped import TEACHERS, graph, half_of

MAPS = np.random.default_rng(0).random((20, 4, 4)).astype(np.float32)
FEATURES = np.random.default_rng(1).standard_normal((20, 3, 4, 4)).astype(np.float32)


def against(features: np.ndarray, maps: np.ndarray, precision: str = "fp32") -> tuple[float, str]:
    found = difference(
        {"features.last": features, "saliency": maps},
        {"features.last": FEATURES, "saliency": MAPS},
        precision,
    )
    return found.largest, found.problem


def test_equal_answers_differ_by_nothing() -> None:
    largest, problem = against(FEATURES, MAPS)
    assert (largest, problem) == (pytest.approx(0, abs=1e-9), "")


@pytest.mark.parametrize(
    ("precision", "off", "agrees"),
    [("fp32", 5e-3, True), ("fp32", 2e-2, False), ("fp16", 1e-2, True), ("fp16", 4e-2, False)],
)
def test_features_may_differ_as_far_as_the_precision_explains(
    precision: str, off: float, agrees: bool
) -> None:
    changed = FEATURES.copy()
    changed[7, 1, 2, 3] += off * np.abs(FEATURES).max()
    largest, problem = against(changed, MAPS, precision)
    assert largest == pytest.approx(off, rel=1e-3)
    assert (problem == "") is agrees


@pytest.mark.parametrize(("others", "agrees"), [(2, True), (3, False)])
def test_a_few_maps_may_explain_another_class(others: int, agrees: bool) -> None:
    changed = MAPS.copy()
    changed[:others] = 1 - changed[:others]
    _, problem = against(FEATURES, changed)
    assert (problem == "") is agrees


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_or_of_another_shape_never_agrees(value: float) -> None:
    changed = FEATURES.copy()
    changed[0, 0, 0, 0] = value
    assert "not finite" in against(changed, MAPS)[1]
    assert "features.last is [19, 3, 4, 4]" in against(FEATURES[:19], MAPS)[1]


def test_two_flat_maps_agree_and_a_flat_one_with_another_does_not() -> None:
    flat = np.zeros_like(MAPS)
    assert difference({"saliency": flat}, {"saliency": flat}, "fp32").problem == ""
    assert difference({"saliency": flat}, {"saliency": MAPS}, "fp32").problem


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ((9.0, 1.0), (1.0, 2.0), False),  # the large batch decides
        ((1.0, 2.0), (9.0, 1.0), True),
        ((1.0, 1.02), (2.0, 1.0), False),  # nearly the same: the single image decides
        ((2.0, 0.98), (1.0, 1.0), True),
        ((1.0, 1.0), (1.0, 1.0), True),  # what answers already stays
    ],
)
def test_slower(mine: tuple[float, ...], theirs: tuple[float, ...], expected: bool) -> None:
    trials = [
        Trial(runtime="r", provider="p", precision="fp32", ms_per_image=times)
        for times in (mine, theirs)
    ]
    assert slower(*trials) is expected


def test_times_are_per_image_at_both_batches() -> None:
    one, many = ms_per_image(OnnxRuntimeSession(teacher_graph(), threads=1), pictures(3))
    assert many > 0
    assert one > 0


def test_generated_images_are_the_same_everywhere_and_say_something() -> None:
    images = generated((40, 24))
    assert (images.shape, images.dtype) == ((16, 40, 24, 3), np.uint8)
    assert images.std() > 30
    assert np.array_equal(images, generated((40, 24)))
    neighbours = np.abs(np.diff(images.astype(int), axis=2)).mean()
    assert neighbours < 25  # pictures, and no noise


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_half_precision_of_every_shipped_teacher_agrees(path: Path) -> None:
    """As docs/hardware.md says: to 6.1e-4, here as an order of magnitude."""
    single, size = graph(path.stem)
    images = generated(size)
    one, half = (OnnxRuntimeSession(g, threads=1) for g in (single, half_of(path.stem)))
    found = difference(half.run(images, one.outputs), one.run(images, one.outputs), "fp16")
    assert found.problem == ""
    assert 0 < found.largest < 1e-3


class TestBundles:
    def model(self, card: TeacherCard, **files: bytes) -> Model:
        packed = bundles.pack(
            card,
            {"teacher.onnx": teacher_graph(), **{n.replace("_", "."): d for n, d in files.items()}},
            OWNER,
        )
        return teacher_model(bundles.unpack(packed, [OWNER.public_key()]))

    def test_one_from_before_has_one_graph_and_generated_images(self) -> None:
        model = self.model(TeacherCard(teacher=TEACHER))
        assert list(model.graphs) == ["fp32"]
        assert np.array_equal(model.images(), generated((8, 8)))

    def test_half_precision_and_a_probe_of_the_owner_s_come_along(self) -> None:
        card = TeacherCard(teacher=TEACHER, half="half.onnx", probe="probe.npy")
        model = self.model(card, half_onnx=b"half", probe_npy=npy(pictures(20)))
        assert model.graphs["fp16"] == b"half"
        assert np.array_equal(model.images(), pictures(20)[:16])

    @pytest.mark.parametrize("probe", [b"nothing", npy(pictures(2).astype(np.float32))])
    def test_a_probe_that_is_none_is_one_sentence(self, probe: bytes) -> None:
        card = TeacherCard(teacher=TEACHER, probe="probe.npy")
        with pytest.raises(
            CheckFailed, match=r"the images probe\.npy in the bundle cannot be used"
        ):
            self.model(card, probe_npy=probe)
