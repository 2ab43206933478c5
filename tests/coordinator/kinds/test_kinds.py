"""What every kind of task decides, at its seam."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordinator.amalgamation.answers import TeacherAnswers
from coordinator.augmentation import Jitter
from coordinator.data import LabelledImages, read_labelled, read_task, spread
from coordinator.kinds import KINDS, Features, kind_named
from coordinator.kinds.dense import IGNORE, cell_shares, mean_iou
from coordinator.kinds.kind import Fit, Teaching
from coordinator.kinds.multi_label import average_precision, mean_average_precision
from edge_teacher.contract.errors import UsageError
from tests.coordinator.kinds_of_data import MAKE

PIXELS = np.zeros((3, 4, 4, 3), np.uint8)


def test_there_are_three_kinds_and_another_is_said() -> None:
    assert set(KINDS) == {"single-label", "multi-label", "dense"}
    assert all(kind.name == name for name, kind in KINDS.items())
    with pytest.raises(UsageError, match="no kind of task 'regression'; it is one of dense, multi"):
        kind_named("regression")


@pytest.mark.parametrize("name", MAKE)
def test_a_fitted_head_says_what_its_labels_say(name: str) -> None:
    kind, labelled = kind_named(name), MAKE[name](40, 0).checked("here")
    # Features that tell everything: which colour is there in which part, for every cell.
    x = torch.from_numpy(labelled.images).permute(0, 3, 1, 2).float() / 255
    cells = torch.nn.functional.avg_pool2d(x, 2)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, (3, 1)).flatten(1)
    features = Features(cells, cells.mean((2, 3)) if name == "dense" else pooled)
    channels = 3 if name == "dense" else 9
    head = kind.head(channels, 3, (16, 16))
    kind.refit(head, features, labelled.labels, features, Fit(folds=3, seed=0))
    with torch.no_grad():
        logits = kind.logits(head, features).numpy()
    assert logits.ndim == kind.dimensions
    found = kind.measure(kind.kept(logits), labelled.labels)
    assert tuple(found) == kind.metrics
    assert found[kind.metrics[0]] > 0.9
    # Measured against labels that have nothing to do with the images, it is no better than chance.
    other = np.roll(labelled.labels, 7, axis=0)
    assert kind.measure(kind.kept(logits), other)[kind.metrics[0]] < 0.7


def sight(labelled: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, maps) of a teacher that sees every colour in every part of an image."""
    x = torch.from_numpy(labelled.images).permute(0, 3, 1, 2).float() / 255
    thirds = torch.nn.functional.adaptive_avg_pool2d(x, (3, 1)).flatten(1)
    return thirds, torch.nn.functional.avg_pool2d(x, 2).half()


@pytest.mark.parametrize("name", MAKE)
def test_what_teachers_see_becomes_targets_for_every_image(name: str) -> None:
    kind, make = kind_named(name), MAKE[name]
    probe, transfer, others = make(40, 0), make(30, 1), make(10, 2)
    # The probe set of another task comes first: its images are unlabelled ones for this task.
    seen = [sight(labelled) for labelled in (others, probe, transfer)]
    pooled_probe, maps_probe = (torch.cat([seen[0][i], seen[1][i]]) for i in (0, 1))
    teacher = TeacherAnswers(pooled_probe, seen[2][0], seen[2][1], maps_probe)
    # A second one that knows nothing, with maps of another size.
    noise = torch.Generator().manual_seed(0)
    blind = TeacherAnswers(
        torch.randn(50, 4, generator=noise),
        torch.randn(30, 4, generator=noise),
        torch.randn(30, 4, 3, 5, generator=noise).half(),
        torch.randn(50, 4, 3, 5, generator=noise).half(),
    )
    labels = probe.checked("here").labels
    teaching = Teaching([teacher, blind], slice(10, 50), labels, 3, 0.5, Fit(folds=3, seed=0))
    taught = kind.teach(teaching)
    assert taught.score > 0.8
    assert len(taught.soft) == 30 + 50
    size = (taught.soft.shape[2], taught.soft.shape[3]) if name == "dense" else (0, 0)
    assert name != "dense" or size == (8, 8)

    def truth(labelled: LabelledImages) -> torch.Tensor:
        given = torch.from_numpy(labelled.checked("here").labels)
        if name == "dense":
            return cell_shares(given, 3, size)
        return given.float() if name == "multi-label" else torch.eye(3)[given]

    every = torch.cat([truth(transfer), truth(others)])
    guess = torch.cat([taught.soft[:30], taught.soft[30:40]]).float()
    counts = every.sum(1, keepdim=True) > 0 if name == "dense" else torch.ones_like(every) > 0
    assert (((guess > 0.5) == (every > 0.5)) | ~counts).float().mean() > 0.9
    assert torch.allclose(taught.soft[40:].float(), truth(probe), atol=1e-3)


@pytest.mark.parametrize("name", MAKE)
def test_the_loss_is_least_where_the_answer_is_the_label(name: str) -> None:
    kind = kind_named(name)
    labels = torch.from_numpy(MAKE[name](6, 0).checked("here").labels)
    if name == "dense":
        right = torch.nn.functional.one_hot(labels.long().clamp_max(2), 3).permute(0, 3, 1, 2)
    else:
        right = labels if name == "multi-label" else torch.nn.functional.one_hot(labels, 3)
    sure = 8.0 * (2 * right.float() - 1)
    losses = [float(kind.loss(share * sure, labels)) for share in (1.0, 0.5, 0.0, -1.0)]
    assert all(a < b for a, b in pairwise(losses))
    assert losses[0] < 0.01


def test_pixels_that_do_not_count_are_in_no_loss_and_no_metric() -> None:
    kind = kind_named("dense")
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 4, 4, dtype=torch.uint8)
    labels[:, :2] = IGNORE
    changed = logits.clone()
    changed[:, :, :2] = 100.0
    assert torch.equal(kind.loss(logits, labels), kind.loss(changed, labels))
    nothing = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    assert float(kind.loss(logits, nothing)) == 0
    same = [kind.measure(kind.kept(x.numpy()), labels.numpy()) for x in (logits, changed)]
    assert same[0] == same[1]
    assert kind.measure(kind.kept(logits.numpy()), nothing.numpy())["pixel_accuracy"] == 0


def test_masks_move_with_their_images() -> None:
    labelled = MAKE["dense"](8, 0).checked("here")
    jitter = Jitter.draw(8, 3, torch.Generator().manual_seed(1))
    as_image = torch.from_numpy(np.repeat(labelled.labels[..., None], 3, axis=3))
    moved = kind_named("dense").moved(torch.from_numpy(labelled.labels), jitter)
    assert torch.equal(moved, jitter.images(as_image)[..., 0])
    assert not torch.equal(moved, torch.from_numpy(labelled.labels))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_average_precision_is_what_its_definition_says(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    levels = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    scores = np.array(data.draw(levels), np.float64)
    truth = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    truth[0] = True
    expected, recall = 0.0, 0.0
    for level in sorted(set(scores), reverse=True):
        called = scores >= level
        reached = truth[called].sum() / truth.sum()
        expected += (reached - recall) * truth[called].mean()
        recall = reached
    assert average_precision(scores, truth) == pytest.approx(expected)


def test_a_class_of_no_image_is_not_in_the_mean() -> None:
    truth = np.array([[1, 0], [0, 0], [1, 0]], bool)
    scores = np.array([[3.0, 0], [2, 0], [1, 0]])
    assert mean_average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision(scores, np.zeros((3, 2), bool)) == 0


def test_mean_iou_by_hand() -> None:
    truth, guess = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 1])
    assert mean_iou(guess, truth) == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)


def test_a_cell_has_the_shares_of_the_pixels_that_count() -> None:
    labels = torch.tensor([[[0, 0, 1, 255], [0, 1, 1, 255], [255, 255, 2, 2], [255, 255, 2, 0]]])
    shares = cell_shares(labels.to(torch.uint8), 3, (2, 2))[0]
    assert shares[:, 0, 0].tolist() == pytest.approx([3 / 4, 1 / 4, 0])
    assert shares[:, 0, 1].tolist() == pytest.approx([0, 1, 0])
    assert shares[:, 1, 0].tolist() == [0, 0, 0]
    assert shares[:, 1, 1].tolist() == pytest.approx([1 / 4, 0, 3 / 4])


@pytest.mark.parametrize("name", MAKE)
def test_a_part_of_a_set_keeps_every_class(name: str) -> None:
    kind, labelled = kind_named(name), MAKE[name](90, 0).checked("here")
    part = spread(labelled, 20)
    assert 15 <= len(part) <= 20
    assert part.kind == name
    shares = [kind.targets(x.labels, 3).mean(0) for x in (part, labelled)]
    assert kind.targets(part.labels, 3).shape == (len(part), 3)
    assert (shares[0] > 0.5 * shares[1]).all()
    assert set(kind.groups(part.labels)) == set(kind.groups(labelled.labels))


def test_labels_are_renumbered_by_name() -> None:
    order = np.array([2, 0])
    assert kind_named("single-label").renumbered(np.array([0, 1]), order, 3).tolist() == [2, 0]
    columns = kind_named("multi-label").renumbered(np.array([[1, 0], [1, 1]], np.uint8), order, 3)
    assert columns.tolist() == [[0, 0, 1], [1, 0, 1]]
    mask = np.array([[[0, 1, 255]]], np.uint8)
    assert kind_named("dense").renumbered(mask, order, 3).tolist() == [[[2, 0, 255]]]


@pytest.mark.parametrize(
    ("kind", "labels", "says"),
    [
        ("multi-label", np.zeros((3, 3), np.uint8), r"uint8 \[3, 3\]; it must be uint8 \[3, 2\]"),
        ("multi-label", np.full((3, 2), 2, np.uint8), "has the value 2; it must be 1 where"),
        ("multi-label", np.zeros((3, 2), np.float32), "is float32"),
        ("dense", np.zeros((3, 4, 5), np.uint8), r"integers \[3, 4, 4\], one for each pixel"),
        ("dense", np.full((3, 4, 4), 2), "has the value 2; with 2 classes .* or be 255"),
        ("dense", np.full((3, 4, 4), -1), "has the value -1"),
        ("single-label", np.array([0, 1, 2]), "runs from 0 to 2; with 2 classes"),
    ],
)
def test_labels_of_another_shape_or_value_are_said(
    kind: str, labels: np.ndarray, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        LabelledImages(PIXELS, labels, ("a", "b"), kind).checked("x.npz")


@pytest.mark.parametrize(
    ("kind", "labels", "says"),
    [
        ("multi-label", [[1, 0], [1, 1], [1, 0]], "the class 'a' is in all images or in none"),
        ("dense", np.full((3, 4, 4), 255), "no pixel that counts"),
        ("dense", np.zeros((3, 4, 4), np.int64), "pixels of the class 'a' only"),
    ],
)
def test_a_probe_set_that_teaches_nothing_is_said(
    tmp_path: Path, kind: str, labels: object, says: str
) -> None:
    path = tmp_path / "probe.npz"
    np.savez(path, images=PIXELS, labels=np.array(labels), classes=np.array(["a", "b"]))
    with pytest.raises(UsageError, match=says):
        read_task(path, path, kind=kind)


# ── files ────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette(bytes(range(256)) * 3)
        image.frombytes(pixels.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def test_a_folder_with_a_table_reads_like_its_npz(tmp_path: Path) -> None:
    labelled = MAKE["multi-label"](6, 0)
    lines = ["file,classes"]
    for i, image in enumerate(labelled.images):
        save(tmp_path / "set" / "deep" / f"{i}.png", image)
        there = [labelled.classes[c] for c in np.flatnonzero(labelled.labels[i])]
        lines.append(f"deep/{i}.png,{'; '.join(there)}")
    (tmp_path / "set" / "labels.csv").write_text("\n".join(lines))
    order = [labelled.classes.index(name) for name in sorted(labelled.classes)]
    found = read_labelled(tmp_path / "set", "multi-label")
    assert found.classes == tuple(sorted(labelled.classes))
    assert np.array_equal(found.labels, labelled.labels[:, order])
    assert np.array_equal(found.images, labelled.images)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, "has no labels.csv"),
        ("0.png,a\n0.png,b", "Line 2 of labels.csv in .* names a file again"),
        ("0.png,a,b", "has 3 columns"),
        ("1.png,a\n0.png,b", "1.png in .* is in labels.csv only"),
        ("", "0.png in .* has no line in labels.csv"),
    ],
)
def test_a_table_that_does_not_fit_is_said(tmp_path: Path, table: str | None, says: str) -> None:
    save(tmp_path / "0.png", PIXELS[0])
    if table is not None:
        (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(UsageError, match=says):
        read_labelled(tmp_path, "multi-label")


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_folder_of_masks_reads_like_its_npz(tmp_path: Path, mode: str) -> None:
    labelled = MAKE["dense"](4, 0)
    for i, image in enumerate(labelled.images):
        save(tmp_path / "images" / f"{i}.png", image)
        save(tmp_path / "masks" / f"{i}.png", labelled.labels[i].astype(np.uint8), mode)
    (tmp_path / "classes.txt").write_text("\n".join(labelled.classes) + "\n")
    np.savez(
        tmp_path / "same.npz",
        **{
            "images": labelled.images,
            "labels": labelled.labels,
            "classes": np.array(labelled.classes),
        },
    )
    found, same = (read_labelled(tmp_path / n, "dense") for n in (".", "same.npz"))
    assert found.classes == same.classes == labelled.classes
    assert np.array_equal(found.labels, same.labels)
    assert np.array_equal(found.labels, labelled.labels)
    assert np.array_equal(found.images, labelled.images)


def test_masks_that_do_not_fit_are_said(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0.png", PIXELS[0])
    with pytest.raises(UsageError, match="has 1 images in images/ and 0 masks"):
        read_labelled(tmp_path, "dense")
    save(tmp_path / "masks" / "1.png", PIXELS[0, :, :, 0])
    with pytest.raises(UsageError, match=r"0 in .* is in images/ only"):
        read_labelled(tmp_path, "dense")
    (tmp_path / "masks" / "1.png").unlink()
    save(tmp_path / "masks" / "0.png", PIXELS[0])
    with pytest.raises(UsageError, match="is PNG in mode RGB; it must be a PNG with a palette"):
        read_labelled(tmp_path, "dense")
    save(tmp_path / "masks" / "0.png", np.zeros((5, 4), np.uint8))
    with pytest.raises(UsageError, match="have 5x4 pixels and the images 4x4"):
        read_labelled(tmp_path, "dense")
    save(tmp_path / "masks" / "0.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "images" / "0.bmp").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    with pytest.raises(UsageError, match="only their endings tell apart"):
        read_labelled(tmp_path, "dense")


def test_an_npz_without_class_names_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=np.zeros((3, 2), np.uint8))
    for kind in ("multi-label", "dense"):
        with pytest.raises(UsageError, match="no array called 'classes'"):
            read_labelled(tmp_path / "x.npz", kind)
