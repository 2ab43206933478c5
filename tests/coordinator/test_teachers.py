from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.answers import RememberedAnswers
from coordinator.teachers import RemoteTeacher
from edge_teacher.agent.pooling import attention_pool
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Answered, FeaturesQuery
from edge_teacher.rpc.invoke import Caller
from tests.coordinator.fleet_of_agents import world
from tests.edge_teacher.nets import pictures, teacher_answers

IMAGES = pictures(10)
FEATURES, SALIENCY = teacher_answers(IMAGES)


def test_what_it_answers_is_what_the_teacher_computes(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        assert teacher.name == "d1"
        for found, expected in (
            (teacher.saliency(IMAGES), SALIENCY),
            (teacher.features(IMAGES), FEATURES),
            (teacher.pooled(IMAGES), FEATURES.mean((2, 3))),
        ):
            assert found.dtype == np.float32
            assert np.allclose(found, expected, atol=1e-3)


def test_the_device_makes_the_mirror_images_itself(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        expected, _ = teacher_answers(np.ascontiguousarray(IMAGES[:, :, ::-1]))
        mirrored = teacher.pooled(IMAGES, mirrored=True)
        assert np.allclose(mirrored, expected.mean((2, 3)), atol=1e-3)
        sent = here.caller.wire["d1"]["put_images"].sent
        query = FeaturesQuery(block=image_block_id(IMAGES), mirrored=True)
        _, tensors = here.caller.call("d1", "features", query, answer=Answered)
        assert np.allclose(tensors["features"], expected, atol=1e-2)
        assert not np.allclose(expected, FEATURES, atol=1e-2)
        teacher.pooled(IMAGES)
        assert here.caller.wire["d1"]["put_images"].sent == sent


def attention_maps(size: int = 4, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((len(IMAGES), size, size), np.float32)


def test_features_are_pooled_under_the_attention_that_goes_along(tmp_path: Path) -> None:
    maps = attention_maps()
    maps[2] = 0
    shares = maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-12)
    expected = (FEATURES * shares[:, None]).sum((2, 3))
    expected[2] = FEATURES[2].mean((1, 2))
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        for scale in (1.0, 1e-9, 1e30):  # only the shape of a map counts
            found = teacher.attended(IMAGES, maps * np.float32(scale))
            assert np.allclose(found, expected, atol=2e-3)
        assert np.allclose(teacher.attended(IMAGES, maps, tap="last"), expected, atol=2e-3)
        assert here.asked().count("features") == 3
        # Other attention is another question.
        other = teacher.attended(IMAGES, attention_maps(seed=4))
        assert not np.allclose(other, expected, atol=1e-2)


def test_attention_larger_than_a_message_is_sent_in_parts(tmp_path: Path) -> None:
    maps = attention_maps(400)
    with world(tmp_path) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        found = teacher.attended(IMAGES, maps)
        assert np.allclose(found, attention_pool(FEATURES, maps), atol=2e-3)
        assert here.asked().count("features") == 4


def test_attention_comes_along_again_when_the_device_has_forgotten_the_images(
    tmp_path: Path,
) -> None:
    limits = Limits(max_images_per_block=5, image_store_bytes=IMAGES.nbytes // 2)
    maps = attention_maps()
    with world(tmp_path, limits=limits) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        teacher.saliency(IMAGES)
        found = teacher.attended(IMAGES, maps)
        assert np.allclose(found, attention_pool(FEATURES, maps), atol=2e-3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.ones((9, 4, 4), np.float32), r"\[9, 4, 4\], and must be \[10, s, s\]"),
        (-np.ones((10, 4, 4), np.float32), "negative"),
        (np.full((10, 4, 4), np.nan, np.float32), "non-finite"),
        (np.ones((10, 800, 800), np.float32), "800 × 800 does not fit"),
    ],
)
def test_what_is_no_attention(tmp_path: Path, wrong: np.ndarray, words: str) -> None:
    with world(tmp_path) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        with pytest.raises(UsageError, match=words):
            teacher.attended(IMAGES, wrong)
        assert here.asked() == []


def test_a_tap_is_asked_for_by_its_name(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), RememberedAnswers(tmp_path / "cache"))
        assert np.array_equal(teacher.pooled(IMAGES, tap="last"), teacher.pooled(IMAGES))
        assert here.asked().count("features") == 1
        with pytest.raises(UsageError, match="d1 has no tap 'first': take one of last"):
            teacher.pooled(IMAGES, tap="first")


def test_nothing_is_asked_twice_and_the_answers_do_not_change(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        card = here.add("d1")
        first = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache"))
        answers = first.saliency(IMAGES)
        asked = len(here.asked())
        assert np.array_equal(first.saliency(IMAGES), answers)
        # A resumed run, another process: the same files.
        again = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache"))
        assert np.array_equal(again.saliency(IMAGES), answers)
        assert len(here.asked()) == asked
        # Other images among known ones: only those are asked about.
        more = np.concatenate([IMAGES[:8], pictures(4, seed=5)])
        assert np.allclose(again.saliency(more), teacher_answers(more)[1], atol=1e-3)
        assert here.asked()[asked:].count("saliency") == 1


class Interrupted(RememberedAnswers):
    """Ctrl-C comes right after the first answer was kept."""

    def remember(self, *arguments: object) -> None:
        super().remember(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt


def test_what_came_before_an_interruption_is_kept(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        card, folder = here.add("d1"), tmp_path / "cache"
        with pytest.raises(KeyboardInterrupt):
            RemoteTeacher(here.caller, card, Interrupted(folder)).saliency(IMAGES)
        before = here.asked().count("saliency")
        again = RemoteTeacher(here.caller, card, RememberedAnswers(folder))
        assert np.allclose(again.saliency(IMAGES), SALIENCY, atol=1e-3)
        assert here.asked().count("saliency") == before + 2


def test_another_bundle_or_another_question_is_another_answer(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        card, cache = here.add("d1"), RememberedAnswers(tmp_path / "cache")
        RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
        asked = here.asked().count("saliency")
        newer = msgspec.structs.replace(card, bundle="ff" * 32)
        RemoteTeacher(here.caller, newer, cache).saliency(IMAGES)
        assert here.asked().count("saliency") == asked + 1
        teacher = RemoteTeacher(here.caller, card, cache)
        assert teacher.pooled(IMAGES).shape != teacher.features(IMAGES).shape


def test_an_image_is_known_whatever_it_is_asked_about_with(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        card = here.add("d1")
        RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache")).saliency(IMAGES)
        asked = here.asked().count("saliency")
        again = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache"))
        mixed = np.concatenate([IMAGES[7:2:-1], pictures(3, seed=5), IMAGES[:2]])
        assert np.allclose(again.saliency(mixed), teacher_answers(mixed)[1], atol=1e-3)
        assert here.asked().count("saliency") == asked + 1


def test_a_damaged_answer_is_asked_for_again_and_that_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with world(tmp_path, limits=Limits(max_images_per_block=1)) as here:
        card = here.add("d1")
        with RememberedAnswers(tmp_path / "cache") as cache:
            RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
            RemoteTeacher(here.caller, card, cache).pooled(IMAGES)
        for path in (tmp_path / "cache").glob("*/*/records.f16"):
            wrong = bytearray(path.read_bytes())
            wrong[0] ^= 1
            wrong[-1] ^= 1
            path.write_bytes(wrong)
        asked = len(here.asked())
        again = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache", said.append))
        assert np.allclose(again.saliency(IMAGES), SALIENCY, atol=1e-3)
        assert np.allclose(again.pooled(IMAGES), FEATURES.mean((2, 3)), atol=1e-3)
        new = here.asked()[asked:]
        assert (new.count("saliency"), new.count("features")) == (2, 2)
    assert len(said) == 1
    assert "damaged" in said[0]


def test_on_a_full_disk_answers_still_come_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        cache = RememberedAnswers(tmp_path / "cache", said.append)
        teacher = RemoteTeacher(here.caller, here.add("d1"), cache)
        monkeypatch.setattr(os, "pwrite", full)
        for _ in range(2):
            assert np.allclose(teacher.saliency(IMAGES), SALIENCY, atol=1e-3)
        assert here.asked().count("saliency") == 6
    (sentence,) = said
    assert "No space left" in sentence
    assert str(tmp_path / "cache") in sentence


def test_a_folder_that_cannot_be_written_is_said_too(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with world(tmp_path) as here:
        cache = RememberedAnswers(tmp_path / "cache", said.append)
        teacher = RemoteTeacher(here.caller, here.add("d1"), cache)
        assert np.allclose(teacher.saliency(IMAGES), SALIENCY, atol=1e-3)
    assert len(said) == 1


def test_what_a_device_says_of_its_bundle_leads_nowhere_else(tmp_path: Path) -> None:
    with world(tmp_path / "world") as here:
        (tmp_path / "world").mkdir()
        card = msgspec.structs.replace(here.add("d1"), bundle="../../outside")
        cache = RememberedAnswers(tmp_path / "a" / "cache")
        RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
        again = RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
        assert np.allclose(again, SALIENCY, atol=1e-3)
        assert here.asked().count("saliency") == 1
    assert not (tmp_path / "outside").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "world"}


class TestCoarse:
    """What travelled as u8 is no substitute for what travels as fp16; the other way round it is."""

    def test_exact_answers_are_not_served_from_coarse_ones(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            card = here.add("d1")
            here.caller.traffic.measured("d1", 1 << 20, 1.0)
            cache = RememberedAnswers(tmp_path / "cache")
            coarse = RemoteTeacher(here.caller, card, cache).features(IMAGES)
            for _ in range(30):
                here.caller.traffic.measured("d1", 1 << 20, 1e-3)
            exact = RemoteTeacher(here.caller, card, cache).features(IMAGES)
            assert here.asked().count("features") == 2
            assert np.array_equal(exact, FEATURES.astype(np.float16).astype(np.float32))
            assert not np.array_equal(coarse, exact)

    def test_coarse_ones_are_served_from_exact_ones(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            card = here.add("d1")
            cache = RememberedAnswers(tmp_path / "cache")
            exact = RemoteTeacher(here.caller, card, cache).features(IMAGES)
            here.caller.traffic.measured("d1", 1 << 20, 1.0)
            found = RemoteTeacher(here.caller, card, cache).features(IMAGES)
            assert np.array_equal(found, exact)
            assert here.asked().count("features") == 1

    def test_a_new_run_on_the_slow_link_asks_nothing(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            here.add("d1")
            here.caller.traffic.measured("d1", 1 << 20, 1.0)
            card = here.agents["d1"].card()
            first = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "cache"))
            answers = first.features(IMAGES)
            again = Caller(here.transport, "bob")  # which knows nothing of the link yet
            try:
                second = RemoteTeacher(again, card, RememberedAnswers(tmp_path / "cache"))
                assert np.array_equal(second.features(IMAGES), answers)
                assert again.wire == {}
            finally:
                again.close()
