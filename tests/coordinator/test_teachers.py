from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.teachers import AnswerCache, RemoteTeacher
from edge_teacher.agent.pooling import attention_pool
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Answered, FeaturesQuery
from tests.coordinator.fleet_of_agents import world
from tests.edge_teacher.nets import pictures, teacher_answers

IMAGES = pictures(10)
FEATURES, SALIENCY = teacher_answers(IMAGES)


def test_what_it_answers_is_what_the_teacher_computes(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
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
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
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
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
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
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
        found = teacher.attended(IMAGES, maps)
        assert np.allclose(found, attention_pool(FEATURES, maps), atol=2e-3)
        assert here.asked().count("features") == 4


def test_attention_comes_along_again_when_the_device_has_forgotten_the_images(
    tmp_path: Path,
) -> None:
    limits = Limits(max_images_per_block=5, image_store_bytes=IMAGES.nbytes // 2)
    maps = attention_maps()
    with world(tmp_path, limits=limits) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
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
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
        with pytest.raises(UsageError, match=words):
            teacher.attended(IMAGES, wrong)
        assert here.asked() == []


def test_a_tap_is_asked_for_by_its_name(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        teacher = RemoteTeacher(here.caller, here.add("d1"), AnswerCache(tmp_path / "cache"))
        assert np.array_equal(teacher.pooled(IMAGES, tap="last"), teacher.pooled(IMAGES))
        assert here.asked().count("features") == 1
        with pytest.raises(UsageError, match="d1 has no tap 'first': take one of last"):
            teacher.pooled(IMAGES, tap="first")


def test_nothing_is_asked_twice_and_the_answers_do_not_change(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        card = here.add("d1")
        first = RemoteTeacher(here.caller, card, AnswerCache(tmp_path / "cache"))
        answers = first.saliency(IMAGES)
        asked = len(here.asked())
        assert np.array_equal(first.saliency(IMAGES), answers)
        # A resumed run, another process: the same files.
        again = RemoteTeacher(here.caller, card, AnswerCache(tmp_path / "cache"))
        assert np.array_equal(again.saliency(IMAGES), answers)
        assert len(here.asked()) == asked
        # Other images among known ones: only those are asked about.
        more = np.concatenate([IMAGES[:8], pictures(4, seed=5)])
        assert np.allclose(again.saliency(more), teacher_answers(more)[1], atol=1e-3)
        assert here.asked()[asked:].count("saliency") == 1


class Interrupted(AnswerCache):
    """Ctrl-C comes right after the first answer was kept."""

    def put(self, key: str, answer: np.ndarray) -> None:
        super().put(key, answer)
        raise KeyboardInterrupt


def test_what_came_before_an_interruption_is_kept(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        card, folder = here.add("d1"), tmp_path / "cache"
        with pytest.raises(KeyboardInterrupt):
            RemoteTeacher(here.caller, card, Interrupted(folder)).saliency(IMAGES)
        assert len(list(folder.glob("*.npy"))) == 1
        before = here.asked().count("saliency")
        again = RemoteTeacher(here.caller, card, AnswerCache(folder))
        assert np.allclose(again.saliency(IMAGES), SALIENCY, atol=1e-3)
        assert here.asked().count("saliency") == before + 2


def test_another_bundle_or_another_question_is_another_answer(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        card, cache = here.add("d1"), AnswerCache(tmp_path / "cache")
        RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
        asked = here.asked().count("saliency")
        newer = msgspec.structs.replace(card, bundle="ff" * 32)
        RemoteTeacher(here.caller, newer, cache).saliency(IMAGES)
        assert here.asked().count("saliency") == asked + 1
        teacher = RemoteTeacher(here.caller, card, cache)
        assert teacher.pooled(IMAGES).shape != teacher.features(IMAGES).shape


class TestCache:
    def test_there_and_not_there(self, tmp_path: Path) -> None:
        cache = AnswerCache(tmp_path)
        assert cache.get("a", 2) is None
        cache.put("a", np.ones((2, 3), np.float16))
        found = cache.get("a", 2)
        assert found is not None
        assert (found.dtype, found.tolist()) == (np.float16, [[1.0] * 3] * 2)
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]

    def test_every_truncation_is_dropped_and_asked_again(self, tmp_path: Path) -> None:
        cache = AnswerCache(tmp_path)
        cache.put("a", np.ones((2, 3), np.float16))
        path = tmp_path / "a.npy"
        whole = path.read_bytes()
        for end in range(len(whole)):
            path.write_bytes(whole[:end])
            assert cache.get("a", 2) is None, end
            assert not path.exists()

    @pytest.mark.parametrize(
        "content",
        [b"garbage" * 20, b"PK\x03\x04" + bytes(100), b"\x80\x04N.", b"\x93NUMPY\x01\x00\xff"],
    )
    def test_what_is_no_array_is_dropped(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.npy"
        path.write_bytes(content)
        assert AnswerCache(tmp_path).get("a", 3) is None
        assert not path.exists()

    def test_an_archive_of_arrays_is_no_answer(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        with path.open("wb") as file:
            np.savez(file, a=np.ones(3))
        assert AnswerCache(tmp_path).get("a", 3) is None

    def test_a_file_of_another_shape_or_kind_is_asked_for_again(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        with world(tmp_path) as here:
            card, cache = here.add("d1"), AnswerCache(folder)
            RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
            (path,) = folder.iterdir()
            for wrong in (np.zeros((9, 4, 4), np.float16), np.zeros((), np.float16)):
                np.save(path, wrong)
                found = RemoteTeacher(here.caller, card, cache).saliency(IMAGES)
                assert np.allclose(found, SALIENCY, atol=1e-3)
