"""A whole agent with a small real graph, asked over the in-memory transport."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.contract import frame, topics
from edge_teacher.contract.errors import (
    CheckFailed,
    Malformed,
    NotAllowed,
    NotFound,
    RuntimeFailed,
    TooLarge,
    Unreachable,
    UsageError,
)
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import (
    Answered,
    Card,
    Empty,
    FeaturesQuery,
    PredictQuery,
    PutImages,
    Received,
    SaliencyQuery,
    State,
    StudentCommand,
    StudentOffer,
    StudentOffered,
    StudentStatus,
    TapInfo,
    Telemetry,
)
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker, MemoryTransport
from edge_teacher.rpc.transport import Handler, Message
from tests.edge_teacher.nets import (
    CLASSES,
    COORDINATOR,
    OWNER,
    STRANGER,
    TASK,
    TEACHER,
    pictures,
    student,
    student_answers,
    teacher_answers,
    teacher_bundle,
)

DEVICE = "jetson-1"
IMAGES = pictures(70)  # more than one batch of the session
BLOCK = image_block_id(IMAGES)


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    bundle = tmp_path / "teacher.fedsa"
    bundle.write_bytes(teacher_bundle())
    return AgentConfig(
        device=DEVICE,
        bundle=bundle,
        owners=[OWNER.public_key()],
        coordinator_keys=[COORDINATOR.public_key()],
        state=tmp_path / "state",
        telemetry_s=0.02,
        limits=Limits(image_store_bytes=1 << 20),
    )


@dataclass
class Running:
    agent: Agent
    transport: MemoryTransport
    broker: MemoryBroker
    caller: Caller
    heard: queue.Queue[Message]

    def call(self, method: str, body: msgspec.Struct, answer: type, **tensors: np.ndarray):  # type: ignore[no-untyped-def]
        return self.caller.call(DEVICE, method, body, tensors, answer=answer, timeout_s=20)

    def put(self, images: np.ndarray) -> Received:
        request = PutImages(block=image_block_id(images), shape=images.shape)
        received, _ = self.call("put_images", request, Received, data=images.reshape(-1))
        return received  # type: ignore[no-any-return]

    def states(self, count: int) -> list[State]:
        """The first `count` that the coordinator hears."""
        return [frame.decode(self.heard.get(timeout=10).payload, State)[0] for _ in range(count)]

    def retained(self, channel: str) -> Message:
        (found,) = self.broker.retained(f"fedsa/v1/{DEVICE}/{channel}")
        return found


def begin(config: AgentConfig, broker: MemoryBroker | None = None) -> Running:
    broker = broker or MemoryBroker()
    heard: queue.Queue[Message] = queue.Queue()
    listener = broker.connect()
    listener.subscribe("fedsa/v1/+/state", heard.put)
    caller = Caller(listener, "ada", tick_s=0.02)
    agent = Agent(config)
    transport = broker.connect(agent.will())
    agent.start(transport)
    return Running(agent, transport, broker, caller, heard)


@pytest.fixture
def here(config: AgentConfig) -> Iterator[Running]:
    running = begin(config)
    yield running
    running.caller.close()
    running.agent.stop()


class TestAnswers:
    def test_describe_is_the_card_that_is_retained(
        self, here: Running, config: AgentConfig
    ) -> None:
        card, _ = here.call("describe", Empty(), Card)
        assert (card.device, card.teacher) == (DEVICE, TEACHER)
        assert card.bundle == hashlib.sha256(config.bundle.read_bytes()).hexdigest()
        assert card.runtime.provider == "CPUExecutionProvider"
        assert frame.decode(here.retained("card").payload, Card)[0] == card

    @pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("f32", 1e-6)])
    def test_saliency(self, here: Running, dtype: str, tolerance: float) -> None:
        here.put(IMAGES)
        _, tensors = here.call("saliency", SaliencyQuery(block=BLOCK, dtype=dtype), Answered)  # type: ignore[arg-type]
        assert tensors["saliency"].dtype == np.dtype(
            dtype.replace("f16", "f2").replace("f32", "f4")
        )
        assert np.allclose(tensors["saliency"], teacher_answers(IMAGES)[1], atol=tolerance)

    def test_feature_maps_and_their_means(self, here: Running) -> None:
        here.put(IMAGES)
        features, saliency = teacher_answers(IMAGES)
        _, maps = here.call("features", FeaturesQuery(block=BLOCK, dtype="f32"), Answered)
        assert np.allclose(maps["features"], features, atol=1e-6)
        query = FeaturesQuery(block=BLOCK, tap="last", form="pooled", dtype="f32")
        answered, pooled = here.call("features", query, Answered)
        assert np.allclose(pooled["features"], features.mean((2, 3)), atol=1e-6)
        assert answered.compute_ms > 0
        query = FeaturesQuery(block=BLOCK, form="attention", dtype="f32")
        _, under = here.call("features", query, Answered, attention=saliency.astype(np.float16))
        expected = (features * saliency[:, None]).sum((2, 3)) / saliency.sum((1, 2))[:, None]
        assert np.allclose(under["features"], expected, atol=1e-3)

    def test_maps_that_would_be_too_large_are_refused_before_they_are_computed(
        self, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = msgspec.structs.replace(config.limits, max_answer_bytes=64)
        running = begin(replace(config, limits=limits))
        try:
            running.put(IMAGES)
            monkeypatch.setattr(running.agent._session, "run", None)  # calling it would be a 500
            with pytest.raises(TooLarge, match="the limit is 64"):
                running.call("features", FeaturesQuery(block=BLOCK), Answered)
        finally:
            running.caller.close()
            running.agent.stop()

    def test_an_attention_query_without_attention_is_malformed(self, here: Running) -> None:
        here.put(IMAGES)
        with pytest.raises(Malformed, match="attention"):
            here.call("features", FeaturesQuery(block=BLOCK, form="attention"), Answered)

    def test_a_tap_it_does_not_have_is_not_found_by_name(self, here: Running) -> None:
        here.put(IMAGES)
        with pytest.raises(NotFound, match="no tap 'logits'; it has last"):
            here.call("features", FeaturesQuery(block=BLOCK, tap="logits"), Answered)

    @pytest.mark.parametrize(
        ("method", "query"),
        [
            ("saliency", SaliencyQuery(block=BLOCK)),
            ("features", FeaturesQuery(block=BLOCK)),
            ("predict", PredictQuery(task=TASK, block=BLOCK)),
        ],
    )
    def test_images_it_does_not_hold_are_not_found(
        self, here: Running, method: str, query: msgspec.Struct
    ) -> None:
        with pytest.raises(NotFound, match=f"image block {BLOCK}: send it"):
            here.call(method, query, Answered)

    def test_images_of_a_wrong_type_are_malformed(self, here: Running) -> None:
        request = PutImages(block=BLOCK, shape=IMAGES.shape)
        with pytest.raises(Malformed, match="must be u8"):
            here.call("put_images", request, Received, data=np.zeros(8, np.float32))
        with pytest.raises(Malformed, match="missing"):
            here.call("put_images", request, Received)

    def test_a_form_that_does_not_exist_is_malformed(self, here: Running) -> None:
        class Wrong(msgspec.Struct):
            block: str
            form: str

        with pytest.raises(Malformed, match="FeaturesQuery"):
            here.call("features", Wrong(BLOCK, "weights"), Answered)


class TestStudents:
    def offer(self, here: Running, made, data: bytes | None = None, **changes: object):  # type: ignore[no-untyped-def]
        card, bundle = made
        fields = {
            "task": card.task,
            "version": card.version,
            "digest": hashlib.sha256(bundle).hexdigest(),
            "total_bytes": len(bundle),
            **changes,
        }
        piece = np.frombuffer(bundle if data is None else data, np.uint8)
        return here.call("student.offer", StudentOffer(**fields), StudentOffered, data=piece)[0]  # type: ignore[arg-type]

    def test_offered_activated_asked_and_rolled_back(self, here: Running) -> None:
        here.put(IMAGES)
        for version in (1, 2):
            offered = self.offer(here, student(version))
            assert offered.received.next_offset == offered.received.total_bytes
            assert offered.status.candidate_version == version
            command = StudentCommand(task=TASK, version=version)
            status, _ = here.call("student.activate", command, StudentStatus)
            assert (status.state, status.active_version) == ("active", version)
            # The retained card says so to whoever comes later.
            card, _ = frame.decode(here.retained("card").payload, Card)
            assert card.students == (status,)
            answered, tensors = here.call("predict", PredictQuery(task=TASK, block=BLOCK), Answered)
            assert (answered.student_version, answered.classes) == (version, CLASSES)
            assert np.allclose(tensors["logits"], student_answers(IMAGES), atol=1e-5)
        status, _ = here.call("student.rollback", StudentCommand(task=TASK), StudentStatus)
        assert status.active_version == 1
        status, _ = here.call("student.status", StudentCommand(task=TASK), StudentStatus)
        assert status.active_version == 1

    def test_what_changes_the_device_is_remembered_as_a_command(self, here: Running) -> None:
        assert here.agent._server is not None
        methods = here.agent._server._methods
        commands = {name for name, method in methods.items() if getattr(method, "changes", False)}
        assert commands == {"student.offer", "student.activate", "student.rollback"}

    def test_what_fails_is_told_with_its_reason(self, here: Running) -> None:
        with pytest.raises(Malformed, match="not trusted here"):
            self.offer(here, student(key=STRANGER))
        self.offer(here, student(order=(1, 2, 0)))
        with pytest.raises(RuntimeFailed, match="canary batch"):
            here.call("student.activate", StudentCommand(task=TASK, version=1), StudentStatus)
        with pytest.raises(NotAllowed, match="not newer"):
            self.offer(here, student(0))
        with pytest.raises(NotFound, match="no previous"):
            here.call("student.rollback", StudentCommand(task=TASK), StudentStatus)
        here.put(IMAGES)
        with pytest.raises(NotFound, match="no student"):
            here.call("predict", PredictQuery(task=TASK, block=BLOCK), Answered)

    @pytest.mark.parametrize("name", ["../x", "", "a/b"])
    def test_a_task_or_digest_that_is_a_path_is_malformed(
        self, here: Running, config: AgentConfig, name: str
    ) -> None:
        for change in ({"task": name}, {"digest": name}):
            with pytest.raises(Malformed):
                self.offer(here, student(), **change)
        for method in ("student.activate", "student.rollback"):
            with pytest.raises((Malformed, NotFound)):
                here.call(method, StudentCommand(task=name, version=1), StudentStatus)
        assert list(config.state.rglob("*")) == [config.state / "students"]


class TestLife:
    def test_the_card_is_there_before_the_birth(self, config: AgentConfig) -> None:
        order: list[str] = []

        def note(message: Message) -> list[Message]:
            order.append(message.topic.rsplit("/", 1)[1])
            return [message]

        running = begin(config, MemoryBroker(note))
        assert order[:2] == ["card", "state"]
        running.caller.close()
        running.agent.stop()
        assert [state.online for state in running.states(2)] == [True, False]

    def test_a_broker_that_does_not_let_it_hear_is_tried_again(self, config: AgentConfig) -> None:
        class Deaf(MemoryTransport):
            def subscribe(self, topic_filter: str, handler: Handler, *, wait: bool = True) -> None:
                raise Unreachable(f"the broker did not grant {topic_filter!r}")

        broker = MemoryBroker()
        agent = Agent(config)
        with pytest.raises(Unreachable, match="did not grant"):
            agent.start(Deaf(broker, agent.will()))
        assert broker.retained("fedsa/v1/+/state") == []
        agent.start(broker.connect(agent.will()))
        caller = Caller(broker.connect(), "ada", tick_s=0.02)
        assert caller.call(DEVICE, "describe", Empty(), answer=Card)[0].device == DEVICE
        caller.close()
        agent.stop()

    def test_birth_and_a_clean_end_are_of_one_session(self, here: Running) -> None:
        here.call("describe", Empty(), Card)
        here.agent.stop()
        born, gone = here.states(2)
        assert (born.online, gone.online) == (True, False)
        assert born.session == gone.session
        assert frame.decode(here.retained("state").payload, State)[0] == gone

    def test_a_killed_one_leaves_its_will_and_the_next_has_a_session_of_its_own(
        self, config: AgentConfig
    ) -> None:
        broker = MemoryBroker()
        first = begin(config, broker)
        first.transport.kill()
        first.agent._stopped.set()  # its threads die with it
        dead, _ = frame.decode(first.retained("state").payload, State)
        assert not dead.online
        second = begin(config, broker)
        alive, _ = frame.decode(second.retained("state").payload, State)
        assert alive.online
        assert alive.session != dead.session
        for running in (first, second):
            running.caller.close()
        second.agent.stop()

    def test_every_question_is_answered_before_the_end(self, here: Running) -> None:
        statuses: list[str] = []
        complete = threading.Event()

        def note(message: Message) -> None:
            statuses.append(message.user["status"])
            if len(statuses) == 30:
                complete.set()

        here.broker.connect().subscribe("fedsa/v1/bob/rsp/+", note)
        here.put(IMAGES)
        asker = here.broker.connect()
        for i in range(30):
            query = frame.encode(SaliencyQuery(block=BLOCK))
            topic, back = topics.request(DEVICE, "saliency"), topics.response("bob", DEVICE)
            asker.publish(
                Message(topic=topic, payload=query, response_topic=back, correlation=bytes([i]))
            )
        here.call("describe", Empty(), Card)  # all of them have arrived
        here.agent.stop()
        assert complete.wait(10), statuses
        assert set(statuses) <= {"200", "503"}

    def test_a_reconnection_during_the_goodbye_is_no_second_birth(self, here: Running) -> None:
        here.agent.stop()
        here.agent._announce()  # as the connection does
        assert not frame.decode(here.retained("state").payload, State)[0].online

    def test_telemetry_tells_how_it_is(self, here: Running) -> None:
        arrived = threading.Event()
        found: list[Telemetry] = []

        def note(message: Message) -> None:
            found.append(frame.decode(message.payload, Telemetry)[0])
            if found[-1].images_held:
                arrived.set()

        here.put(IMAGES)
        here.broker.connect().subscribe(topics.telemetry(DEVICE), note)
        assert arrived.wait(10)
        last = found[-1]
        assert last.images_held == 70
        assert last.answered >= 1
        assert last.rss_bytes > 1 << 20
        assert last.uptime_s >= 0

    def test_a_restarted_agent_still_has_its_student(self, config: AgentConfig) -> None:
        running = begin(config)
        TestStudents().offer(running, student(5))
        running.call("student.activate", StudentCommand(task=TASK, version=5), StudentStatus)
        running.caller.close()
        running.agent.stop()
        again = begin(config)
        assert again.agent.card().students[0].active_version == 5
        again.caller.close()
        again.agent.stop()


class TestReconfigured:
    """While it serves; see test_daemon.py for who does it."""

    def test_limits_hold_from_the_next_request_and_are_announced(
        self, here: Running, config: AgentConfig
    ) -> None:
        here.put(IMAGES)
        smaller = msgspec.structs.replace(
            config.limits, image_store_bytes=IMAGES.nbytes - 1, max_answer_bytes=64
        )
        here.agent.reconfigure(replace(config, limits=smaller))
        assert frame.decode(here.retained("card").payload, Card)[0].limits == smaller
        # What is held beyond the new bound is let go at once.
        with pytest.raises(NotFound, match="send it"):
            here.call("saliency", SaliencyQuery(block=BLOCK), Answered)
        with pytest.raises(TooLarge, match=f"at most .* {smaller.image_store_bytes} bytes"):
            here.put(IMAGES)
        here.put(IMAGES[:3])
        few = image_block_id(IMAGES[:3])
        with pytest.raises(TooLarge, match="the limit is 64"):
            here.call("features", FeaturesQuery(block=few), Answered)
        here.agent.reconfigure(config)
        here.call("features", FeaturesQuery(block=few), Answered)

    def test_keys_and_coordinators_hold_from_the_next_request(
        self, here: Running, config: AgentConfig
    ) -> None:
        here.agent.reconfigure(replace(config, coordinator_keys=[STRANGER.public_key()]))
        with pytest.raises(Malformed, match="not trusted here"):
            TestStudents().offer(here, student())
        TestStudents().offer(here, student(key=STRANGER))
        here.agent.reconfigure(replace(config, allowed=frozenset({"bob"})))
        with pytest.raises(NotAllowed, match="ada is not among"):
            here.call("describe", Empty(), Card)

    def test_a_queue_that_is_made_shorter_refuses_the_next(
        self, here: Running, config: AgentConfig
    ) -> None:
        assert here.agent._server is not None
        limits = msgspec.structs.replace(config.limits, max_queued_requests=1)
        here.agent.reconfigure(replace(config, limits=limits))
        here.put(IMAGES)
        statuses: queue.Queue[str] = queue.Queue()
        asker = here.broker.connect()
        asker.subscribe("fedsa/v1/bob/rsp/+", lambda m: statuses.put(m.user["status"]))
        payload = frame.encode(SaliencyQuery(block=BLOCK))
        topic, back = topics.request(DEVICE, "saliency"), topics.response("bob", DEVICE)
        for i in range(50):
            asker.publish(
                Message(topic=topic, payload=payload, response_topic=back, correlation=bytes([i]))
            )
        assert "429" in {statuses.get(timeout=10) for _ in range(50)}

    def test_another_ceiling_cuts_the_limits_and_one_that_leaves_nothing_changes_nothing(
        self, here: Running, config: AgentConfig
    ) -> None:
        before = here.agent.card().limits
        with pytest.raises(UsageError, match="the memory ceiling of 1 bytes leaves"):
            here.agent.reconfigure(replace(config, memory_bytes=1, allowed=frozenset({"bob"})))
        assert here.agent.card().limits == before
        here.call("describe", Empty(), Card)  # ada is still answered
        small = here.agent.telemetry().rss_bytes + (64 << 20)
        here.agent.reconfigure(replace(config, memory_bytes=small))
        assert here.agent.card().limits.max_answer_bytes < before.max_answer_bytes
        here.agent.reconfigure(config)
        assert here.agent.card().limits == before


class TestRefusals:
    """Everything is loaded and verified before the agent says it is there."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"garbage", "damaged or no bundle"),
            (teacher_bundle(key=STRANGER), "not trusted here"),
            (student(key=OWNER)[1], "holds a student"),
            (
                teacher_bundle(
                    msgspec.structs.replace(
                        TEACHER, taps={"mid": TapInfo(channels=1, height=1, width=1)}
                    )
                ),
                r"lacks the outputs features\.mid",
            ),
        ],
        ids=["garbage", "stranger", "student", "outputs"],
    )
    def test_a_bundle_that_is_none_of_ours(
        self, config: AgentConfig, content: bytes, message: str
    ) -> None:
        config.bundle.write_bytes(content)
        with pytest.raises(CheckFailed, match=message):
            Agent(config)

    def test_a_bundle_that_is_not_there(self, config: AgentConfig) -> None:
        with pytest.raises(UsageError, match="cannot be read"):
            Agent(replace(config, bundle=config.bundle / "nowhere"))

    def test_a_state_folder_that_cannot_be_made(self, config: AgentConfig) -> None:
        with pytest.raises(UsageError, match="cannot be used"):
            Agent(replace(config, state=config.bundle / "state"))
