from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import (
    Busy,
    Draining,
    Malformed,
    NotAllowed,
    NotFound,
    RpcError,
    RuntimeFailed,
    TooLarge,
)
from edge_teacher.contract.limits import CHUNK_BYTES, Limits
from edge_teacher.contract.messages import Chunk, Control, Problem
from edge_teacher.rpc.memory import MemoryTransport
from edge_teacher.rpc.serve import Answer, Tensors
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.rpc.wire import COORDINATOR, DEVICE, Ask, Said, World, noise, world

RESPONSE = topics.response(COORDINATOR, DEVICE)


class Peer:
    """A coordinator by hand: sees exactly what a device sends."""

    def __init__(self, transport: MemoryTransport, name: str = COORDINATOR) -> None:
        self.heard: list[Message] = []
        self._arrived = threading.Condition()
        self._transport = transport
        transport.subscribe(topics.responses(name), self._note)

    def _note(self, message: Message) -> None:
        with self._arrived:
            self.heard.append(message)
            self._arrived.notify_all()

    def wait(self, count: int) -> list[Message]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.heard) >= count, 10), self.heard
            return list(self.heard)

    def ask(
        self,
        method: str = "echo",
        payload: bytes | None = None,
        *,
        correlation: bytes = b"c1",
        respond_to: str = RESPONSE,
        expiry_s: int | None = None,
    ) -> None:
        self._transport.publish(
            Message(
                topic=f"fedsa/v1/{DEVICE}/req/{method}",
                payload=frame.encode(Ask(text="hello")) if payload is None else payload,
                response_topic=respond_to,
                correlation=correlation,
                expiry_s=expiry_s,
            )
        )

    def control(self, control: Control) -> None:
        self._transport.publish(
            Message(topic=topics.control(DEVICE), payload=frame.encode(control))
        )

    def fence(self) -> None:
        """Everything sent before has been handled: messages of one connection stay in order."""
        self.ask("no_such_method", correlation=b"fence")
        with self._arrived:
            assert self._arrived.wait_for(
                lambda: any(m.correlation == b"fence" for m in self.heard), 10
            )
            self.heard = [m for m in self.heard if m.correlation != b"fence"]


@pytest.fixture
def here() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def peer(here: World) -> Iterator[Peer]:
    transport = here.broker.connect()
    yield Peer(transport)
    transport.close()


def problem_in(message: Message) -> RpcError:
    problem, _ = frame.decode(message.payload, Problem)
    assert message.user["status"] == str(problem.code)
    found = [k for k in RpcError.__subclasses__() if k.code == problem.code]
    return found[0](problem.message, retry_after_s=problem.retry_after_s)


def test_the_answer_carries_correlation_status_version_and_source(peer: Peer) -> None:
    peer.ask()
    (answer,) = peer.wait(1)
    assert answer.topic == RESPONSE
    assert answer.correlation == b"c1"
    spent_ms = float(answer.user["ms"])
    assert 0 <= spent_ms < 10_000
    assert answer.user == {"status": "200", "v": PROTOCOL, "src": DEVICE, "ms": answer.user["ms"]}
    assert frame.decode(answer.payload, Said)[0].text == "hello"


def test_a_duplicate_is_executed_once_and_answered_again(here: World, peer: Peer) -> None:
    peer.ask()
    peer.wait(1)
    peer.ask()
    peer.ask()
    assert len({answer.payload for answer in peer.wait(3)}) == 1
    assert len(here.device.executed) == 1
    assert here.server.counters.answered == 1


def test_a_duplicate_of_what_is_being_computed_is_left_alone(here: World, peer: Peer) -> None:
    peer.ask("hold")
    assert here.device.begun.acquire(timeout=10)
    peer.ask("hold")
    peer.fence()
    here.device.may_go_on.set()
    peer.wait(1)
    peer.fence()
    assert len(here.device.executed) == 1
    assert len(peer.heard) == 1


def test_the_same_correlation_of_two_coordinators_are_two_requests(here: World) -> None:
    first, second = (Peer(here.broker.connect(), name) for name in ("ada", "bob"))
    first.ask(respond_to=topics.response("ada", DEVICE))
    second.ask(respond_to=topics.response("bob", DEVICE))
    assert len(first.wait(1)) == len(second.wait(1)) == 1
    assert len(here.device.executed) == 2


def test_the_answer_cache_is_bounded_in_bytes() -> None:
    with world(limits=Limits(answer_cache_bytes=300_000)) as here:
        peer = Peer(here.broker.connect())
        ask = frame.encode(Ask(bytes_back=100_000))
        for i in range(5):
            peer.ask(payload=ask, correlation=bytes([i]))
            peer.wait(i + 1)
        for i in (4, 3, 0):
            peer.ask(payload=ask, correlation=bytes([i]))
        peer.wait(8)
        # The two newest were remembered, the oldest had to be computed again.
        assert len(here.device.executed) == 6
        assert here.server._answers.nbytes <= 300_000


@pytest.mark.parametrize(
    "respond_to",
    [
        "",
        "fedsa/v1/ada/rsp/other",
        "fedsa/v1/other/state",
        "fedsa/v1/d1/req/echo",
        "fedsa/v1/+/rsp/d1",
        "#",
    ],
)
def test_a_response_topic_that_is_not_a_coordinators_is_dropped(
    here: World, peer: Peer, respond_to: str
) -> None:
    peer.ask(respond_to=respond_to)
    peer.fence()
    assert here.device.executed == []
    assert [m for m in here.published if m.correlation == b"c1"] == here.sent_to("req")[:1]
    assert here.server.counters.refused == 2  # it, and the fence


@pytest.mark.parametrize("method", ["nothing", "student.nothing"])
def test_an_unknown_method_is_not_found(peer: Peer, method: str) -> None:
    peer.ask(method)
    error = problem_in(peer.wait(1)[0])
    assert type(error) is NotFound
    assert "echo" in str(error)


@pytest.mark.parametrize("correlation", [b"", b"x" * 65])
def test_correlation_data_of_another_length_is_malformed(peer: Peer, correlation: bytes) -> None:
    peer.ask(correlation=correlation)
    assert type(problem_in(peer.wait(1)[0])) is Malformed


@pytest.mark.parametrize("payload", [b"", b"garbage", frame.encode(Said(text="", times=1))[:-1]])
def test_a_payload_that_is_no_frame_is_malformed(peer: Peer, payload: bytes) -> None:
    peer.ask(payload=payload)
    assert type(problem_in(peer.wait(1)[0])) is Malformed


def test_a_coordinator_that_is_not_allowed_gets_403_and_learns_nothing() -> None:
    with world(allowed=frozenset({"bob"})) as here:
        peer = Peer(here.broker.connect())
        for i, method in enumerate(("echo", "nothing")):
            peer.ask(method, correlation=bytes([i]))
            error = problem_in(peer.wait(i + 1)[i])
            assert type(error) is NotAllowed
            assert "ada is not among" in str(error)
        bob = Peer(here.broker.connect(), "bob")
        bob.ask(respond_to=topics.response("bob", DEVICE))
        assert bob.wait(1)[0].user["status"] == "200"
        assert here.device.executed == ["hello"]


def test_a_failing_method_says_so_and_the_worker_lives_on(here: World, peer: Peer) -> None:
    peer.ask("fail", correlation=b"1")
    error = problem_in(peer.wait(1)[0])
    assert type(error) is RuntimeFailed
    assert "the weights ran out" in str(error)
    assert here.server.counters.failed == 1
    peer.ask(correlation=b"2")
    assert peer.wait(2)[1].user["status"] == "200"


def test_a_refusal_is_not_remembered(here: World, peer: Peer) -> None:
    for i in range(2):
        peer.ask("fail")
        peer.wait(i + 1)
    assert here.server.counters.failed == 2


def test_beyond_the_queue_429_says_when_to_come_again() -> None:
    with world(limits=Limits(max_queued_requests=2)) as here:
        peer = Peer(here.broker.connect())
        peer.ask("hold", correlation=b"0")
        assert here.device.begun.acquire(timeout=10)
        for i in range(1, 5):
            peer.ask("hold", correlation=bytes([i]))
        refused = peer.wait(2)
        errors = [problem_in(m) for m in refused]
        assert [m.correlation for m in refused] == [b"\3", b"\4"]
        assert all(type(e) is Busy and e.retry_after_s and e.retry_after_s > 0 for e in errors)
        here.device.may_go_on.set()
        assert [m.user["status"] for m in peer.wait(5)[2:]] == ["200"] * 3


def test_what_expired_in_the_queue_is_not_computed(
    here: World, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.ask("hold", correlation=b"0")
    assert here.device.begun.acquire(timeout=10)
    peer.ask(correlation=b"1", expiry_s=30)
    peer.ask(correlation=b"2", expiry_s=300)
    peer.fence()
    now = time.monotonic()
    monkeypatch.setattr("edge_teacher.rpc.serve.time.monotonic", lambda: now + 60)
    here.device.may_go_on.set()
    held, expired, answered = peer.wait(3)
    assert (held.user["status"], answered.user["status"]) == ("200", "200")
    assert expired.correlation == b"1"
    assert problem_in(expired).code == 408
    assert len(here.device.executed) == 2


def test_an_answer_beyond_the_limit_is_413_with_the_limit() -> None:
    with world(limits=Limits(max_answer_bytes=1000)) as here:
        peer = Peer(here.broker.connect())
        peer.ask(payload=frame.encode(Ask(bytes_back=1000)))
        error = problem_in(peer.wait(1)[0])
        assert type(error) is TooLarge
        assert "1000" in str(error)


def test_draining_refuses_the_queue_and_finishes_what_is_computed(here: World, peer: Peer) -> None:
    peer.ask("hold", correlation=b"0")
    assert here.device.begun.acquire(timeout=10)
    peer.ask(correlation=b"1")
    peer.fence()
    drained = threading.Thread(target=here.server.drain)
    drained.start()
    (waiting,) = peer.wait(1)
    assert waiting.correlation == b"1"
    assert type(problem_in(waiting)) is Draining
    peer.ask(correlation=b"2")
    assert type(problem_in(peer.wait(2)[1])) is Draining
    here.device.may_go_on.set()
    drained.join(10)
    finished = peer.wait(3)[2]
    assert (finished.correlation, finished.user["status"]) == (b"0", "200")
    assert here.device.executed == ["hello"]


def test_what_is_cancelled_in_the_queue_is_not_computed(here: World, peer: Peer) -> None:
    peer.ask("hold", correlation=b"0")
    assert here.device.begun.acquire(timeout=10)
    peer.ask(correlation=b"1")
    peer.control(Control(kind="cancel", correlation=b"1", respond_to=RESPONSE))
    peer.fence()
    here.device.may_go_on.set()
    peer.ask(correlation=b"2")
    assert [m.correlation for m in peer.wait(2)] == [b"0", b"2"]
    assert len(here.device.executed) == 2


@pytest.mark.parametrize("kind", ["cancel", "resend", "credit"])
def test_a_control_message_about_nothing_is_ignored(here: World, peer: Peer, kind: str) -> None:
    peer.control(Control(kind=kind, correlation=b"?", respond_to=RESPONSE, credits=5))  # type: ignore[arg-type]
    peer.fence()
    assert peer.heard == []
    peer.ask()
    assert peer.wait(1)[0].user["status"] == "200"


class TestChunks:
    """An answer of six chunks; the last is short."""

    @pytest.fixture(autouse=True)
    def asked(self, here: World, peer: Peer) -> None:
        self.peer = peer
        peer.ask(payload=frame.encode(Ask(bytes_back=5 * CHUNK_BYTES + 99)))
        peer.wait(2)
        peer.fence()

    def chunks(self) -> list[Chunk]:
        return [frame.decode(m.payload, Chunk)[0] for m in self.peer.heard]

    def offsets(self) -> list[int]:
        return [chunk.offset // CHUNK_BYTES for chunk in self.chunks()]

    def control(self, kind: str, **more: object) -> None:
        more = {"correlation": b"c1", "respond_to": RESPONSE, **more}
        self.peer.control(Control(kind=kind, **more))  # type: ignore[arg-type]
        self.peer.fence()

    def test_two_are_sent_and_no_more_without_credit(self) -> None:
        assert self.offsets() == [0, 1]
        assert {m.user["status"] for m in self.peer.heard} == {"206"}
        assert len({(c.total_bytes, c.sha256) for c in self.chunks()}) == 1

    def test_each_credit_brings_one_more_and_the_end_is_the_end(self) -> None:
        for _ in range(9):
            self.control("credit", credits=1)
        assert self.offsets() == [0, 1, 2, 3, 4, 5]

    def test_no_credit_is_worth_more_than_the_window(self) -> None:
        self.control("credit", credits=1000)
        assert self.offsets() == [0, 1, 2, 3]

    def test_a_negative_credit_takes_nothing_back(self) -> None:
        self.control("credit", credits=-5)
        self.control("credit", credits=1)
        assert self.offsets() == [0, 1, 2]

    def test_ranges_are_sent_again_and_the_next_credit_goes_on_behind_them(self) -> None:
        end = self.chunks()[0].total_bytes
        last = (5 * CHUNK_BYTES, end - 5 * CHUNK_BYTES)
        self.control("resend", ranges=((2 * CHUNK_BYTES, CHUNK_BYTES), last))
        assert self.offsets() == [0, 1, 2, 5]
        self.control("credit", credits=2)
        assert self.offsets() == [0, 1, 2, 5]

    @pytest.mark.parametrize("wrong", [(0, 5), (1, CHUNK_BYTES), (-1, 1), (1 << 60, CHUNK_BYTES)])
    def test_a_range_that_is_no_chunk_is_ignored(self, wrong: tuple[int, int]) -> None:
        self.control("resend", ranges=(wrong,))
        assert self.offsets() == [0, 1]

    def test_nobody_else_can_draw_the_chunks_to_another_topic(self, here: World) -> None:
        self.control("credit", credits=2, respond_to=topics.response("bob", DEVICE))
        assert self.offsets() == [0, 1]
        assert all(m.topic == RESPONSE for m in here.sent_to("rsp"))

    def test_a_repeated_request_starts_it_again_without_computing(self, here: World) -> None:
        self.peer.ask(payload=frame.encode(Ask(bytes_back=5 * CHUNK_BYTES + 99)))
        self.peer.fence()
        assert self.offsets() == [0, 1, 0, 1]
        assert len(here.device.executed) == 1

    def test_the_chunks_are_the_frame(self) -> None:
        for _ in range(2):
            self.control("credit", credits=2)
        pieces = [frame.decode(m.payload, Chunk)[1]["data"] for m in self.peer.heard]
        payload = np.concatenate(pieces).tobytes()
        _, tensors = frame.decode(payload, Said)
        assert np.array_equal(tensors["noise"], noise(5 * CHUNK_BYTES + 99))


def test_a_worker_outlives_a_transport_that_fails(
    here: World, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = here.device_transport.publish
    failed = threading.Event()

    def fails(message: Message) -> None:
        failed.set()
        raise OSError("no buffer space")

    monkeypatch.setattr(here.device_transport, "publish", fails)
    peer.ask(correlation=b"1")
    assert failed.wait(10)
    monkeypatch.setattr(here.device_transport, "publish", publish)
    for i, correlation in enumerate((b"1", b"2")):  # the retry, and another
        peer.ask(correlation=correlation)
        found = peer.wait(i + 1)[i]
        assert (found.correlation, found.user["status"]) == (correlation, "200")
    assert len(here.device.executed) == 2


def test_retry_after_follows_the_measured_time(here: World, peer: Peer) -> None:
    assert here.server._plain.retry_after_s() == 1.0  # nothing is known yet
    peer.ask()
    peer.wait(1)
    peer.fence()
    end = time.monotonic() + 10
    while here.server._plain.service_s is None:
        assert time.monotonic() < end
    assert here.server._plain.retry_after_s() < 0.5
    here.server._plain.service_s = 1000.0
    assert here.server._plain.retry_after_s() == 30.0


def test_an_idle_server_lets_go_of_old_answers() -> None:
    with world(limits=Limits(answer_cache_s=0.05)) as here:
        peer = Peer(here.broker.connect())
        peer.ask()
        peer.wait(1)
        end = time.monotonic() + 10
        while here.server._answers.nbytes:
            assert time.monotonic() < end


def test_what_expired_makes_room_in_a_full_queue_and_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world(limits=Limits(max_queued_requests=2)) as here:
        peer = Peer(here.broker.connect())
        peer.ask("hold", correlation=b"0")
        assert here.device.begun.acquire(timeout=10)
        peer.ask(correlation=b"1", expiry_s=30)
        peer.ask(correlation=b"2", expiry_s=300)
        peer.fence()
        now = time.monotonic()
        monkeypatch.setattr("edge_teacher.rpc.serve.time.monotonic", lambda: now + 60)
        peer.ask(correlation=b"3")
        (expired,) = peer.wait(1)
        assert expired.correlation == b"1"
        assert problem_in(expired).code == 408
        peer.ask(correlation=b"1")  # with a later deadline it is a new request
        assert problem_in(peer.wait(2)[1]).code == 429
        here.device.may_go_on.set()
        assert [m.correlation for m in peer.wait(5)[2:]] == [b"0", b"2", b"3"]


def test_an_answer_that_is_forgotten_is_not_sent_on() -> None:
    with world(limits=Limits(answer_cache_s=0.05)) as here:
        peer = Peer(here.broker.connect())
        peer.ask(payload=frame.encode(Ask(bytes_back=5 * CHUNK_BYTES)))
        peer.wait(2)
        assert len(here.server._outbox) == 1
        end = time.monotonic() + 10
        while len(here.server._outbox):
            assert time.monotonic() < end


def test_looking_for_what_is_forgotten_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle workers look far more often than an answer's time is long."""
    monkeypatch.setattr("edge_teacher.rpc.serve._IDLE_S", 0.02)
    with world(limits=Limits(answer_cache_s=0.5)) as here:
        peer = Peer(here.broker.connect())
        peer.ask(payload=frame.encode(Ask(bytes_back=5 * CHUNK_BYTES)))
        peer.wait(2)  # and no credit: nobody wants the others any more
        end = time.monotonic() + 10
        while here.server._answers.nbytes or len(here.server._outbox):
            assert time.monotonic() < end


@pytest.mark.parametrize(("text", "status"), [("", "200"), ("fail", "500")])
def test_a_command_is_not_executed_again_however_much_was_answered_since(
    text: str, status: str
) -> None:
    with world(limits=Limits(answer_cache_bytes=250_000)) as here:
        peer = Peer(here.broker.connect())
        command = frame.encode(Ask(text=text))
        peer.ask("change", command, correlation=b"command")
        (first,) = peer.wait(1)
        for i in range(5):
            peer.ask(payload=frame.encode(Ask(bytes_back=100_000)), correlation=bytes([i]))
            peer.wait(i + 2)
        peer.ask("change", command, correlation=b"command")
        again = peer.wait(7)[6]
        assert again.user["status"] == first.user["status"] == status
        assert again.payload == first.payload
        assert len(here.device.executed) == 6


def test_a_command_that_was_withdrawn_while_it_failed_is_not_answered(
    here: World, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = here.device.echo

    def held(ask: Ask, tensors: Tensors) -> Answer:
        here.device.begun.release()
        assert here.device.may_go_on.wait(10)
        return execute(ask, tensors)

    monkeypatch.setattr(here.device, "echo", held)
    command = frame.encode(Ask(text="fail"))
    peer.ask("change", command)
    assert here.device.begun.acquire(timeout=10)
    peer.control(Control(kind="cancel", correlation=b"c1", respond_to=RESPONSE))
    peer.fence()
    here.device.may_go_on.set()
    peer.ask(correlation=b"next")
    assert [m.correlation for m in peer.wait(1)] == [b"next"]
    peer.ask("change", command)
    peer.fence()
    assert len(peer.heard) == 1
