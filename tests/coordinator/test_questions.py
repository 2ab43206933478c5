from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.questions import Questions
from edge_teacher.contract.errors import Busy, Malformed, NotFound, TooLarge
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import UPLOAD_BYTES, Limits
from edge_teacher.contract.messages import (
    Answered,
    FeaturesQuery,
    PredictQuery,
    PutImages,
    Received,
    SaliencyQuery,
)
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from tests.coordinator.fleet_of_agents import World, world
from tests.edge_teacher.nets import pictures, teacher_answers

IMAGES = pictures(10)
BLOCK = image_block_id(IMAGES)


def saliency(questions: Questions, images: np.ndarray) -> np.ndarray:
    answers = questions.ask(
        questions.divide(images),
        "saliency",
        lambda b: SaliencyQuery(block=b, dtype="f32"),
        "saliency",
    )
    return np.concatenate([values for _, values in answers])


def test_answers_come_in_the_order_of_the_images(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=3)) as here:
        questions = Questions(here.caller, here.add("d1"))
        assert np.allclose(saliency(questions, IMAGES), teacher_answers(IMAGES)[1], atol=1e-6)
        assert here.asked().count("saliency") == 4


def test_a_block_is_sent_once(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        card = here.add("d1")
        questions = Questions(here.caller, card)
        for _ in range(3):
            saliency(questions, IMAGES)
        assert here.asked() == ["put_images"] * 2 + ["saliency"] * 3
        sent = here.caller.wire["d1"]["put_images"].sent
        assert IMAGES.nbytes < sent < IMAGES.nbytes + 1000
        # Another coordinator's run: "have you got it?" is enough.
        saliency(Questions(here.caller, card), IMAGES)
        assert here.caller.wire["d1"]["put_images"].sent < sent + 500


def test_an_evicted_block_is_sent_again(tmp_path: Path) -> None:
    limits = Limits(max_images_per_block=5, image_store_bytes=IMAGES.nbytes // 2)
    with world(tmp_path, limits=limits) as here:
        questions = Questions(here.caller, here.add("d1"))
        for _ in range(2):
            assert np.allclose(saliency(questions, IMAGES), teacher_answers(IMAGES)[1], atol=1e-6)


def test_a_block_that_does_not_fit_the_store_is_refused_by_its_name_and_not_sent(
    tmp_path: Path,
) -> None:
    with world(tmp_path, limits=Limits(image_store_bytes=IMAGES.nbytes - 1)) as here:
        questions = Questions(here.caller, here.add("d1"))
        with pytest.raises(
            TooLarge, match=f"d1 cannot hold the image block {BLOCK}.*{IMAGES.nbytes:,}"
        ):
            saliency(questions, IMAGES)
        assert here.asked() == []


def test_a_restarted_device_is_sent_everything_again(tmp_path: Path) -> None:
    with world(tmp_path, "d1") as here:
        questions = Questions(here.caller, here.agents["d1"].card())
        saliency(questions, IMAGES)
        here.agents["d1"].stop()
        here.add("d1")
        assert np.allclose(saliency(questions, IMAGES), teacher_answers(IMAGES)[1], atol=1e-6)


def test_an_image_larger_than_one_piece_is_sent_in_pieces(tmp_path: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, (1, 800, 900, 3), np.uint8)
    assert large.nbytes > 2 * UPLOAD_BYTES
    with world(tmp_path, "d1") as here:
        questions = Questions(here.caller, here.agents["d1"].card())
        ((_, found),) = questions.ask(
            [large], "saliency", lambda b: SaliencyQuery(block=b), "saliency"
        )
        assert found.shape == (1, 400, 450)
        assert here.asked().count("put_images") == 4


def test_what_the_device_refuses_is_raised(tmp_path: Path) -> None:
    with world(tmp_path, "d1") as here:
        questions = Questions(here.caller, here.agents["d1"].card())
        for method, query in (
            ("features", lambda b: FeaturesQuery(block=b, tap="none")),
            ("predict", lambda b: PredictQuery(task="none", block=b)),
        ):
            with pytest.raises(NotFound, match="none"):
                list(questions.ask([IMAGES], method, query, "features"))


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.float32), np.zeros((10, 2, 2, 4), np.uint8), np.zeros((10,), np.int64)],
)
def test_what_are_no_images_is_malformed(tmp_path: Path, wrong: np.ndarray) -> None:
    with world(tmp_path, "d1") as here:
        questions = Questions(here.caller, here.agents["d1"].card())
        with pytest.raises(Malformed):
            list(questions.divide(wrong))


class Liar:
    """A device that answers against the contract."""

    def __init__(self, here: World, rows: int = 10) -> None:
        self.puts = 0
        self.rows = rows
        methods = {
            "put_images": Method(PutImages, self.put),
            "saliency": Method(SaliencyQuery, self.saliency),
        }
        transport = here.broker.connect()
        self.server = Server(transport, "liar", methods, limits=Limits())
        self.server.start()

    def put(self, request: PutImages, _tensors: Tensors) -> Answer:
        self.puts += 1
        total = IMAGES.nbytes
        return Received(next_offset=total if self.rows else 0, total_bytes=total), {}

    def saliency(self, _query: SaliencyQuery, _tensors: Tensors) -> Answer:
        return Answered(compute_ms=0), {"saliency": np.zeros((self.rows, 2, 2), np.float32)}


class Forgetful(Liar):
    """A device whose store others fill: it has lost the block when it is asked about it."""

    def __init__(self, here: World, times: int) -> None:
        self.forgets = times
        self.asked = 0
        self.held = 0
        super().__init__(here)

    def put(self, request: PutImages, tensors: Tensors) -> Answer:
        self.puts += 1
        self.held += tensors["data"].size
        return Received(next_offset=self.held, total_bytes=IMAGES.nbytes), {}

    def saliency(self, query: SaliencyQuery, tensors: Tensors) -> Answer:
        self.asked += 1
        if self.forgets:
            self.forgets -= 1
            self.held = 0
            raise NotFound("this device does not hold the image block")
        return super().saliency(query, tensors)


class TestForgetful:
    def test_it_is_sent_a_block_again_a_few_times(self, tmp_path: Path) -> None:
        with world(tmp_path, "d1") as here:
            device = Forgetful(here, times=3)
            card = msgspec.structs.replace(here.agents["d1"].card(), device="liar")
            assert len(saliency(Questions(here.caller, card), IMAGES)) == 10
            assert device.asked == 4

    def test_and_not_for_ever(self, tmp_path: Path) -> None:
        with world(tmp_path, "d1") as here:
            device = Forgetful(here, times=1000)
            card = msgspec.structs.replace(here.agents["d1"].card(), device="liar")
            with pytest.raises(
                NotFound, match=f"liar has evicted the image block {BLOCK}.* 5 times"
            ):
                saliency(Questions(here.caller, card), IMAGES)
            assert device.asked == 5


def test_what_else_a_device_has_not_got_is_asked_for_once_more_and_no_images_sent(
    tmp_path: Path,
) -> None:
    with world(tmp_path, "d1") as here:
        questions = Questions(here.caller, here.agents["d1"].card())
        saliency(questions, IMAGES)
        sent = here.caller.wire["d1"]["put_images"].sent
        query = lambda b: FeaturesQuery(block=b, tap="none")  # noqa: E731
        with pytest.raises(NotFound, match="has no tap 'none'"):
            list(questions.ask([IMAGES], "features", query, "features"))
        assert here.asked().count("features") == 2
        assert here.caller.wire["d1"]["put_images"].sent < sent + 500


@pytest.mark.parametrize("rows", [9, 11])
def test_an_answer_about_another_number_of_images_is_not_taken(tmp_path: Path, rows: int) -> None:
    with world(tmp_path, "d1") as here:
        Liar(here, rows)
        card = msgspec.structs.replace(here.agents["d1"].card(), device="liar")
        with pytest.raises(Malformed, match=f"liar answered saliency about 10 images .*{rows}"):
            saliency(Questions(here.caller, card), IMAGES)


def test_a_device_that_keeps_nothing_is_not_sent_images_for_ever(tmp_path: Path) -> None:
    with world(tmp_path, "d1") as here:
        liar = Liar(here, rows=0)
        card = msgspec.structs.replace(here.agents["d1"].card(), device="liar")
        with pytest.raises(Busy, match="liar does not keep what it is sent"):
            saliency(Questions(here.caller, card), IMAGES)
        assert liar.puts < 20


def test_two_questions_wait_at_the_device_and_no_more(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=1)) as here:
        questions = Questions(here.caller, here.add("d1"))
        answers = questions.ask(
            questions.divide(IMAGES), "saliency", lambda b: SaliencyQuery(block=b), "saliency"
        )
        next(answers)
        assert here.asked().count("saliency") == 2
        list(answers)
