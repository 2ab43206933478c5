"""Queries computed together, asked over the in-memory transport of a teacher that can be held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_teacher.agent.answers import Answers
from edge_teacher.agent.batching import Batcher, Probe
from edge_teacher.agent.ceiling import MemoryCeiling
from edge_teacher.agent.image_store import ImageStore
from edge_teacher.agent.throttling import Throttling
from edge_teacher.agent.work import Kind
from edge_teacher.contract.errors import Busy, Expired, NotFound, RuntimeFailed, TooLarge
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import MIB, Limits
from edge_teacher.contract.messages import (
    Answered,
    FeaturesQuery,
    PutImages,
    Received,
    RuntimeInfo,
    SaliencyQuery,
)
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.serve import Server
from edge_teacher.slots import Students
from tests.edge_teacher.nets import TEACHER, pictures, teacher_answers
from tests.edge_teacher.rpc.wire import eventually

DEVICE = "d1"
BAD = 66
"""An image whose every value is this fails."""


@dataclass
class Teacher:
    """What tests.edge_teacher.nets describes, in numpy; notes what it was asked."""

    runs: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Event = field(default_factory=threading.Event)
    order: list[bytes] = field(default_factory=list)
    """Every image it was given."""
    most: int = 1 << 30
    """More images at once fail."""

    outputs: tuple[str, ...] = ("features.last", "saliency")
    info: RuntimeInfo = field(
        default_factory=lambda: RuntimeInfo(name="numpy", version="0", provider="", threads=1)
    )

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        self.runs.append((len(images), frozenset(outputs)))
        self.order += [image.tobytes() for image in images]
        self.began.release()
        assert self.go_on.wait(20)
        if len(images) > self.most or (images == BAD).all(axis=(1, 2, 3)).any():
            raise RuntimeFailed("no memory")
        features, saliency = teacher_answers(images)
        found = {"features.last": features, "saliency": saliency}
        return {name: found[name] for name in outputs}

    @property
    def images(self) -> int:
        return sum(count for count, _ in self.runs)


class World:
    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits | None = None,
        memory: MemoryCeiling | None = None,
        sysfs: Path | None = None,
        probes: bool = False,
    ) -> None:
        self.teacher = Teacher()
        limits = limits or Limits()
        self.memory = memory or MemoryCeiling(1 << 34, available=lambda: None)
        images = ImageStore(limits)
        students = Students(
            folder / "students",
            [],
            lambda graph, name: self.teacher,
            dialects=(),
            max_bundle_bytes=1,
        )
        answers = Answers(
            TEACHER, self.teacher, images, students, self._none, self._none,
            max_answer_bytes=limits.max_answer_bytes,
        )  # fmt: skip
        kinds = [Probe(self.teacher, (8, 8), frozenset(self.teacher.outputs))] if probes else []
        self.batcher = Batcher(
            answers, self.memory, Throttling(sysfs or folder / "none"), probes=kinds
        )
        self.broker = MemoryBroker()
        self.server = Server(
            self.broker.connect(), DEVICE, answers.methods(), limits=limits, engine=self.batcher
        )
        self.server.start()
        self._callers: dict[str, Caller] = {}

    def _none(self) -> None:
        raise AssertionError("nobody asks for it here")

    def caller(self, name: str) -> Caller:
        if name not in self._callers:
            self._callers[name] = Caller(
                self.broker.connect(), name, tick_s=0.02, outstanding=10_000
            )
        return self._callers[name]

    def put(self, images: np.ndarray) -> str:
        block = image_block_id(images)
        request = PutImages(block=block, shape=images.shape)
        self.caller("put").call(
            DEVICE, "put_images", request, {"data": images.reshape(-1)}, answer=Received
        )
        return block

    def ask(
        self,
        query: SaliencyQuery | FeaturesQuery,
        who: str = "ada",
        timeout_s: float = 30,
        **along: np.ndarray,
    ) -> Future[Payload]:
        method = "saliency" if isinstance(query, SaliencyQuery) else "features"
        return self.caller(who).submit(DEVICE, method, query, along, timeout_s=timeout_s)

    def answer(self, future: Future[Payload]) -> dict[str, np.ndarray]:
        payload = future.result(30)
        return self.caller("ada").decode(payload, Answered)[1]

    def hold(self) -> tuple[str, Future[Payload]]:
        """A query of one image that the teacher has begun and does not end: what comes now waits."""
        block = self.put(pictures(1, seed=1000))
        self.teacher.go_on.clear()
        held = self.ask(SaliencyQuery(block=block), "holder")
        assert self.teacher.began.acquire(timeout=10)
        return block, held

    def wait_for(self, queued: int) -> None:
        eventually(lambda: self.server.queued == queued)

    def close(self) -> None:
        self.teacher.go_on.set()
        for caller in self._callers.values():
            caller.close()
        self.server.drain()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def learnt(world: World, best: int, outputs: frozenset[str] | None = None) -> None:
    """As if so many images had been measured to be best."""
    for names in (
        [outputs] if outputs else
        [frozenset({"saliency"}), frozenset({"features.last"}), frozenset({"saliency", "features.last"})]
    ):  # fmt: skip
        kind = Kind(id(world.teacher), (8, 8), names)
        for size in (1, 2, 4, 8, 16, 32, 64, 128):
            for _ in range(8):
                world.batcher.sizes.took(kind, size, 1e-4 * size * (1 if size == best else 2))


def test_small_queries_of_many_coordinators_are_one_inference(here: World) -> None:
    learnt(here, 32)
    blocks = [pictures(2, seed) for seed in range(16)]
    ids = [here.put(images) for images in blocks]
    here.hold()
    asked = [
        here.ask(SaliencyQuery(block=block, dtype="f32"), f"c{i}") for i, block in enumerate(ids)
    ]
    here.wait_for(16)
    here.teacher.go_on.set()
    for images, future in zip(blocks, asked, strict=True):
        assert np.allclose(here.answer(future)["saliency"], teacher_answers(images)[1], atol=1e-6)
    assert here.teacher.runs == [(1, frozenset({"saliency"})), (32, frozenset({"saliency"}))]


def test_a_graph_that_hangs_is_seen(here: World) -> None:
    _, held = here.hold()
    assert here.server.stuck(0) == ""  # seen for the first time
    assert "saliency has had no step for 0 s, and 0 s is the limit" in here.server.stuck(0)
    assert here.server.stuck(600) == ""
    here.teacher.go_on.set()
    here.answer(held)
    eventually(lambda: here.server.stuck(0) == "")
    assert here.server.latencies.told()["saliency"].count == 1


def test_a_large_query_whose_steps_come_out_is_not_taken_for_hung(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt(here, 8)
    may_end = threading.Semaphore(0)
    run = here.teacher.run

    def one_at_a_time(images: np.ndarray, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        found = run(images, outputs)
        assert may_end.acquire(timeout=20)
        return found

    monkeypatch.setattr(here.teacher, "run", one_at_a_time)
    here.teacher.go_on.set()
    asked = here.ask(SaliencyQuery(block=here.put(pictures(32, 3))))
    for _ in range(4):
        assert here.teacher.began.acquire(timeout=10)
        assert here.server.stuck(0) == ""  # another step has begun
        assert "saliency has had no step" in here.server.stuck(0)
        may_end.release()
    here.answer(asked)
    assert [count for count, _ in here.teacher.runs] == [8, 8, 8, 8]


def test_only_queries_for_the_same_outputs_share_an_inference(here: World) -> None:
    learnt(here, 32)
    one, two = here.put(pictures(3, 1)), here.put(pictures(4, 2))
    here.hold()
    asked = [here.ask(SaliencyQuery(block=one)), here.ask(FeaturesQuery(block=two), "bob")]
    here.wait_for(2)
    here.teacher.go_on.set()
    for future in asked:
        here.answer(future)
    assert sorted(here.teacher.runs[1:]) == [
        (3, frozenset({"saliency"})),
        (4, frozenset({"features.last"})),
    ]


def test_two_queries_about_one_block_pay_once(here: World) -> None:
    images = pictures(20, 5)
    features, saliency = teacher_answers(images)
    block = here.put(images)
    here.hold()
    maps = here.ask(SaliencyQuery(block=block, dtype="f32"))
    others = here.ask(SaliencyQuery(block=block, dtype="f16"), "bob")
    pooled = here.ask(FeaturesQuery(block=block, form="pooled", dtype="f32"))
    mirrored = here.ask(FeaturesQuery(block=block, mirrored=True, dtype="f32"), "eve")
    here.wait_for(4)
    here.teacher.go_on.set()
    assert np.allclose(here.answer(maps)["saliency"], saliency, atol=1e-6)
    assert np.allclose(here.answer(others)["saliency"], saliency, atol=1e-3)
    assert np.allclose(here.answer(pooled)["features"], features.mean((2, 3)), atol=1e-6)
    # Mirror images are others.
    assert np.allclose(here.answer(mirrored)["features"], features[..., ::-1], atol=1e-6)
    both = frozenset({"saliency", "features.last"})
    assert sum(count for count, outputs in here.teacher.runs if outputs == both) == 20
    assert here.teacher.images == 1 + 20 + 20


@pytest.mark.parametrize("form", ["pooled", "maps", "attention"])
@pytest.mark.parametrize("dtype", ["f32", "u8"])
def test_one_query_for_both_has_both_from_one_pass(here: World, form: str, dtype: str) -> None:
    here.teacher.go_on.set()
    images = pictures(5, 6)
    features, saliency = teacher_answers(images)
    attention = {"attention": saliency} if form == "attention" else {}
    query = FeaturesQuery(block=here.put(images), form=form, dtype=dtype, saliency=True)  # type: ignore[arg-type]
    found = here.answer(here.ask(query, **attention))
    expected = {
        "maps": features,
        "pooled": features.mean((2, 3)),
        "attention": (features * saliency[:, None]).sum((2, 3)) / saliency.sum((1, 2))[:, None],
    }[form]
    if dtype == "u8":
        assert {"features.scale", "saliency.scale"} <= set(found)
        assert (found["features"].shape, found["saliency"].shape) == (
            expected.shape,
            saliency.shape,
        )
    else:
        assert np.allclose(found["features"], expected, atol=1e-5)
        assert np.allclose(found["saliency"], saliency, atol=1e-6)
    assert here.teacher.images == 5


def test_a_lone_query_is_begun_at_once(here: World) -> None:
    block = here.put(pictures(1))
    here.ask(SaliencyQuery(block=block))
    assert here.teacher.began.acquire(timeout=10)  # though a larger batch might be wished for
    assert here.teacher.runs == [(1, frozenset({"saliency"}))]


def test_a_huge_query_does_not_make_small_ones_wait_and_goes_on_itself(here: World) -> None:
    learnt(here, 8)
    huge = pictures(800, 7)
    here_huge = here.put(huge)
    small = [here.put(pictures(2, 100 + i)) for i in range(12)]
    here.hold()
    asked = here.ask(SaliencyQuery(block=here_huge, dtype="f32"), "huge")
    here.wait_for(1)
    little = [here.ask(SaliencyQuery(block=block), f"c{i}") for i, block in enumerate(small)]
    here.wait_for(13)
    here.teacher.go_on.set()
    found = here.answer(asked)["saliency"]
    assert np.allclose(found, teacher_answers(huge)[1], atol=1e-6)
    for future in little:
        here.answer(future)
    # 24 small images with about as many of the huge query beside them, not behind all 800.
    order = here.teacher.order
    assert max(order.index(pictures(2, 100 + i)[1].tobytes()) for i in range(12)) < 100
    assert here.teacher.images == 1 + 800 + 24


def test_one_coordinator_s_small_query_does_not_wait_for_its_own_huge_one_of_another(
    here: World,
) -> None:
    """One line per coordinator: what it asked first comes first, and others are not behind it."""
    learnt(here, 8)
    first, second, other = (here.put(pictures(n, n)) for n in (400, 3, 5))
    here.hold()
    order: list[str] = []
    for name, who, block in (
        ("first", "ada", first),
        ("second", "ada", second),
        ("other", "bob", other),
    ):
        here.ask(SaliencyQuery(block=block), who).add_done_callback(
            lambda _f, name=name: order.append(name)
        )
    here.wait_for(3)
    here.teacher.go_on.set()
    eventually(lambda: len(order) == 3)
    # The last of 400 may still be encoded by one thread when the other is through with three.
    assert order[0] == "other"


def test_who_fails_fails_alone(here: World) -> None:
    learnt(here, 32)
    good, bad = pictures(3, 1), pictures(4, 2)
    bad[2] = BAD
    ids = [here.put(good), here.put(bad)]
    here.hold()
    asked = [
        here.ask(SaliencyQuery(block=block, dtype="f32"), who)
        for block, who in zip(ids, "ab", strict=True)
    ]
    missing = here.ask(SaliencyQuery(block="00" * 32), "c")
    wrong = here.ask(
        FeaturesQuery(block=ids[0], form="attention"), "d", attention=np.ones((9, 2, 2), np.float32)
    )
    here.wait_for(4)
    here.teacher.go_on.set()
    assert np.allclose(here.answer(asked[0])["saliency"], teacher_answers(good)[1], atol=1e-6)
    with pytest.raises(RuntimeFailed, match="no memory"):
        asked[1].result(20)
    with pytest.raises(NotFound, match="send it"):
        missing.result(20)
    with pytest.raises(Exception, match="must be"):
        wrong.result(20)
    assert here.server.counters.failed == 1


def test_where_the_runtime_cannot_do_so_many_at_once_it_is_asked_for_fewer(here: World) -> None:
    learnt(here, 32)
    here.teacher.most = 10
    here.teacher.go_on.set()
    images = pictures(64, 3)
    found = here.answer(here.ask(SaliencyQuery(block=here.put(images), dtype="f32")))
    assert np.allclose(found["saliency"], teacher_answers(images)[1], atol=1e-6)
    failed = [count for count, _ in here.teacher.runs if count > 10]
    assert len(failed) <= 3
    assert here.teacher.runs[-1][0] <= 10


def test_a_withdrawn_query_is_not_computed_to_its_end(here: World) -> None:
    learnt(here, 8)
    block = here.put(pictures(800, 9))
    here.teacher.go_on.clear()
    asked = here.ask(SaliencyQuery(block=block))
    assert here.teacher.began.acquire(timeout=10)
    here.caller("ada").cancel(asked)
    # The cancellation travels in order with what follows it.
    after = here.ask(SaliencyQuery(block=here.put(pictures(1, 10)), dtype="f32"))
    here.teacher.go_on.set()
    here.answer(after)
    eventually(lambda: here.server.queued == 0)
    assert here.teacher.images < 100


def test_a_deadline_in_the_middle_of_a_query_ends_it(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt(here, 8)
    block = here.put(pictures(800, 9))
    asked = here.ask(SaliencyQuery(block=block), timeout_s=600)
    assert here.teacher.began.acquire(timeout=10)
    now = time.monotonic()
    monkeypatch.setattr("edge_teacher.rpc.lanes.time.monotonic", lambda: now + 700)
    here.teacher.go_on.set()
    with pytest.raises(Expired, match="longer than its 600 s"):
        asked.result(20)
    assert here.teacher.images < 100


def test_memory_that_is_short_is_said_before_it_is_taken(tmp_path: Path) -> None:
    memory = MemoryCeiling(100 * MIB, resident=lambda: 20 * MIB, available=lambda: None)
    world = World(tmp_path, memory=memory)
    try:
        block = world.put(pictures(1000, 3))
        world.teacher.go_on.set()
        release = memory.reserve(80 * MIB - 5000)
        world.answer(world.ask(SaliencyQuery(block=world.put(pictures(1)))))  # needs less than that
        with pytest.raises(Busy, match="left of 104,857,600") as refused:
            world.ask(SaliencyQuery(block=block), timeout_s=0.5).result(20)
        assert refused.value.retry_after_s == 1.0
        release()
        assert world.answer(world.ask(SaliencyQuery(block=block)))["saliency"].shape == (1000, 4, 4)
        eventually(lambda: memory.reserved_bytes == 0)
    finally:
        world.close()


def test_an_image_too_large_for_the_memory_never_reaches_the_runtime(tmp_path: Path) -> None:
    resident = [20 * MIB]
    memory = MemoryCeiling(100 * MIB, resident=lambda: resident[0], available=lambda: None)
    world = World(tmp_path, memory=memory)
    try:
        world.teacher.go_on.set()
        large, allowed = (np.zeros((1, side, side, 3), np.uint8) for side in (800, 700))
        with pytest.raises(TooLarge, match="an image of 800 x 800"):
            world.ask(SaliencyQuery(block=world.put(large))).result(20)
        resident[0] = 90 * MIB
        query = SaliencyQuery(block=world.put(allowed))
        with pytest.raises(Busy, match="an image of 700 x 700"):
            world.ask(query, timeout_s=0.5).result(20)
        assert world.teacher.runs == []
        world.answer(world.ask(SaliencyQuery(block=world.put(pictures(1)))))
        resident[0] = 20 * MIB
        assert world.answer(world.ask(query))["saliency"].shape == (1, 350, 350)
    finally:
        world.close()


def test_memory_that_is_short_when_sizes_are_learnt_says_nothing_about_them(tmp_path: Path) -> None:
    resident = [20 * MIB]
    memory = MemoryCeiling(100 * MIB, resident=lambda: resident[0], available=lambda: None)
    resident[0] = 100 * MIB
    world = World(tmp_path, memory=memory, probes=True)
    try:
        eventually(lambda: not world.batcher._probes)
        assert world.teacher.runs == []
        resident[0] = 20 * MIB
        world.teacher.go_on.set()
        both = FeaturesQuery(block=world.put(pictures(40)), saliency=True)
        for _ in range(3):
            world.answer(world.ask(both))
        assert max(count for count, _ in world.teacher.runs) > 1
    finally:
        world.close()


def test_sizes_are_learnt_while_nobody_asks(tmp_path: Path) -> None:
    world = World(tmp_path, probes=True)
    try:
        world.teacher.go_on.set()
        kind = Kind(id(world.teacher), (8, 8), frozenset(world.teacher.outputs))
        eventually(lambda: world.batcher.sizes.untried(kind) is None)
        assert len(world.batcher.sizes.rates(kind)) >= 3
        learnt_from = len(world.teacher.runs)
        world.answer(world.ask(SaliencyQuery(block=world.put(pictures(1)))))
        assert len(world.teacher.runs) == learnt_from + 1
    finally:
        world.close()


def test_a_machine_that_is_throttled_works_slower_and_one_that_is_too_hot_not_at_all(
    tmp_path: Path,
) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    files = {
        "type": "cpu",
        "temp": "91000",
        "trip_point_0_type": "passive",
        "trip_point_0_temp": "90000",
    }
    files |= {"trip_point_1_type": "hot", "trip_point_1_temp": "100000"}
    for name, text in files.items():
        (zone / name).write_text(text + "\n")
    world = World(tmp_path, sysfs=tmp_path / "sys")
    try:
        world.teacher.go_on.set()
        block = world.put(pictures(1))
        world.answer(world.ask(SaliencyQuery(block=block)))
        assert world.batcher._not_before > 0  # a pause has been ordered
        (zone / "temp").write_text("101000\n")
        eventually(lambda: world.batcher._throttling.state.refuses)
        with pytest.raises(Busy, match="too hot: cpu has 101 °C"):
            world.ask(SaliencyQuery(block=block), timeout_s=0.5).result(20)
        (zone / "temp").write_text("40000\n")
        eventually(lambda: not world.batcher._throttling.state.refuses)
        world.answer(world.ask(SaliencyQuery(block=block)))
    finally:
        world.close()


def test_what_waits_at_the_end_is_told_and_what_is_computed_is_answered(here: World) -> None:
    block = here.put(pictures(1))
    _, held = here.hold()
    waiting = here.ask(SaliencyQuery(block=block), "bob")
    here.wait_for(1)
    ending = threading.Thread(target=here.server.drain)
    ending.start()
    with pytest.raises(Exception, match="shutting down"):
        waiting.result(20)
    here.teacher.go_on.set()
    ending.join(20)
    assert not ending.is_alive()
    assert here.answer(held)["saliency"].shape == (1, 4, 4)


# ── any queries in any order ─────────────────────────────────────────────────────────────────

_BLOCKS = [pictures(count, seed) for seed, count in enumerate((1, 2, 3, 7, 8, 20, 70, 33))]

_QUERIES = st.lists(
    st.tuples(
        st.integers(0, 3),  # who
        st.integers(0, len(_BLOCKS) - 1),
        st.sampled_from(["saliency", "maps", "pooled", "attention", "both"]),
        st.booleans(),  # mirrored
        st.sampled_from(["f32", "f16"]),
    ),
    min_size=1,
    max_size=25,
)


def _right(images: np.ndarray, what: str, mirrored: bool) -> Mapping[str, np.ndarray]:
    features, saliency = teacher_answers(images[:, :, ::-1] if mirrored else images)
    weights = np.ones((len(images), 4, 4), np.float32)
    weights[:, 0] = 3
    under = (features * weights[:, None]).sum((2, 3)) / weights.sum((1, 2))[:, None]
    return {
        "saliency": {"saliency": saliency},
        "maps": {"features": features},
        "pooled": {"features": features.mean((2, 3))},
        "attention": {"features": under},
        "both": {"features": features.mean((2, 3)), "saliency": saliency},
    }[what]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(queries=_QUERIES, best=st.sampled_from([1, 2, 8, 32, 128]), held=st.booleans())
def test_whatever_is_asked_in_whatever_order_each_gets_exactly_its_own_rows(
    here: World,
    queries: list[tuple[int, int, str, bool, str]],
    best: int,
    held: bool,
) -> None:
    here.teacher.go_on.set()
    ids = [here.put(images) for images in _BLOCKS]
    learnt(here, best)
    if held:
        while here.teacher.began.acquire(blocking=False):
            pass
        here.hold()
    asked: list[tuple[Future[Payload], Callable[[], Mapping[str, np.ndarray]], str]] = []
    for who, number, what, mirrored, dtype in queries:
        images, block = _BLOCKS[number], ids[number]
        along: dict[str, np.ndarray] = {}
        if what == "saliency":
            mirrored = False
            query: SaliencyQuery | FeaturesQuery = SaliencyQuery(block=block, dtype=dtype)  # type: ignore[arg-type]
        else:
            form = "pooled" if what == "both" else what
            query = FeaturesQuery(
                block=block,
                form=form,
                mirrored=mirrored,
                dtype=dtype,
                saliency=what == "both",  # type: ignore[arg-type]
            )
        if what == "attention":
            along["attention"] = np.ones((len(images), 4, 4), np.float32)
            along["attention"][:, 0] = 3
        future = here.ask(query, f"c{who}", **along)
        asked.append(
            (future, lambda i=images, w=what, m=mirrored: _right(i, w, m), dtype)  # type: ignore[misc]
        )
    here.teacher.go_on.set()
    for future, right, dtype in asked:
        found = here.answer(future)
        for name, values in right().items():
            assert found[name].shape == values.shape
            assert np.allclose(found[name], values, atol=1e-5 if dtype == "f32" else 1e-3)
    eventually(lambda: here.memory.reserved_bytes == 0)  # given back once the answer is out
