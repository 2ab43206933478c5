"""The asking side against a real server, with a broker that loses, repeats and damages."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from edge_teacher.contract import frame, topics
from edge_teacher.contract.errors import (
    Busy,
    Draining,
    Malformed,
    NotFound,
    RuntimeFailed,
    TooLarge,
    Unreachable,
    UsageError,
)
from edge_teacher.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, Limits
from edge_teacher.contract.messages import Control, Problem
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.rpc.wire import (
    COORDINATOR,
    DEVICE,
    TICK_S,
    Ask,
    Line,
    Said,
    World,
    channel_of,
    eventually,
    noise,
    once,
    world,
)

BIG = 5 * CHUNK_BYTES + 99


def echo(here: World, **ask: object) -> tuple[Said, dict[str, frame.Array]]:
    return here.caller.call(DEVICE, "echo", Ask(**ask), answer=Said, timeout_s=20)  # type: ignore[arg-type]


def controls(here: World, kind: str) -> list[Control]:
    found = [frame.decode(m.payload, Control)[0] for m in here.sent_to("ctl")]
    return [control for control in found if control.kind == kind]


def test_an_answer_comes_back_with_its_tensors() -> None:
    with world() as here:
        sent = np.arange(12, dtype=np.float32).reshape(3, 4)
        said, tensors = here.caller.call(
            DEVICE, "echo", Ask(text="hi"), {"a": sent}, answer=Said, timeout_s=20
        )
        assert said.text == "hi"
        assert np.array_equal(tensors["a"], sent)


def test_a_request_says_who_asks_where_to_and_how_long() -> None:
    with world() as here:
        echo(here)
        (request,) = here.sent_to("req")
        assert request.response_topic == topics.response(COORDINATOR, DEVICE)
        assert len(request.correlation) == 16
        assert request.expiry_s == 20
        assert request.user["src"] == COORDINATOR
        echo(here)
        assert here.sent_to("req")[1].correlation != request.correlation


def test_many_at_once_are_not_mixed_up() -> None:
    with world(workers=3, limits=Limits(max_queued_requests=1000)) as here:
        futures = {
            f"q{i}": here.caller.submit(DEVICE, "echo", Ask(text=f"q{i}"), timeout_s=20)
            for i in range(200)
        }
        for text, future in futures.items():
            assert frame.decode(future.result(20), Said)[0].text == text


def test_the_device_s_error_is_raised() -> None:
    with world() as here:
        with pytest.raises(NotFound, match="names no method"):
            here.caller.call(DEVICE, "nothing", Ask(), answer=Said)
        with pytest.raises(RuntimeFailed, match="the weights ran out"):
            here.caller.call(DEVICE, "fail", Ask(), answer=Said)


class TestFaults:
    @pytest.mark.parametrize("channel", ["req", "rsp"])
    def test_a_lost_message_is_asked_again_and_executed_once(self, channel: str) -> None:
        with world(fault=once(lambda m: channel_of(m) == channel)) as here:
            said, _ = echo(here, text="again")
            assert said == Said(text="again", times=1)
            assert here.device.executed == ["again"]
            first, second = here.sent_to("req")
            assert first.correlation == second.correlation
            # In vain once, it is worth the broker's acknowledgement, and so is the answer to it.
            assert (first.qos, second.qos) == (0, 1)
            answers = here.sent_to("rsp")
            assert [m.qos for m in answers] == ([0, 1] if channel == "rsp" else [0])

    def test_every_message_twice(self) -> None:
        with world(fault=lambda m: [m, m]) as here:
            _, tensors = echo(here, bytes_back=BIG)
            assert np.array_equal(tensors["noise"], noise(BIG))
            assert [echo(here, text=str(i))[0].times for i in range(5)] == [2, 3, 4, 5, 6]
            assert len(here.device.executed) == 6

    def test_an_answer_of_nobody_s_question_is_ignored(self) -> None:
        with world() as here:
            stranger = here.broker.connect()
            for correlation in (b"", b"?" * 16):
                stranger.publish(
                    Message(
                        topic=topics.response(COORDINATOR, DEVICE),
                        payload=b"garbage",
                        correlation=correlation,
                        user={"status": "200"},
                    )
                )
            assert echo(here, text="a")[0].text == "a"
            stranger.close()

    def test_an_answer_from_another_device_s_topic_does_not_count(self) -> None:
        def forge(message: Message) -> list[Message]:
            if channel_of(message) != "rsp" or message.topic.endswith("/mallory"):
                return [message]
            lie = frame.encode(Said(text="a lie", times=1))
            return [replace(message, topic="fedsa/v1/ada/rsp/mallory", payload=lie), message]

        with world(fault=forge) as here:
            assert echo(here, text="the truth")[0].text == "the truth"

    @pytest.mark.parametrize(
        "answer",
        [
            {"payload": b""},
            {"payload": b"FSA1"},
            {"user": {}},
            {"user": {"status": "666"}},
            {"payload": b"\xff" * 100, "user": {"status": "404"}},
        ],
    )
    def test_an_answer_that_is_none_raises_a_sentence(self, answer: dict[str, object]) -> None:
        def spoil(message: Message) -> list[Message]:
            return [replace(message, **answer) if channel_of(message) == "rsp" else message]  # type: ignore[arg-type]

        with world(fault=spoil) as here, pytest.raises(Malformed):
            echo(here)

    @pytest.mark.parametrize("lost", range(6))
    def test_one_lost_chunk_is_asked_for_by_range(self, lost: int) -> None:
        seen: list[Message] = []

        def nth(message: Message) -> bool:
            if message.user.get("status") == "206":
                seen.append(message)
                return len(seen) == lost + 1
            return False

        with world(fault=once(nth), retry_s=0.3) as here:
            _, tensors = echo(here, bytes_back=BIG)
            assert np.array_equal(tensors["noise"], noise(BIG))
            assert len(here.device.executed) == 1
            assert len(seen) <= 6 + 4

    def test_a_chunk_with_a_wrong_crc_is_asked_for_again(self) -> None:
        def flip(message: Message) -> list[Message]:
            if message.user.get("status") != "206" or flipped:
                return [message]
            flipped.append(True)
            return [replace(message, payload=message.payload[:-1] + b"\0")]

        flipped: list[bool] = []
        with world(fault=flip) as here:
            _, tensors = echo(here, bytes_back=BIG)
            assert np.array_equal(tensors["noise"], noise(BIG))
            assert flipped

    @pytest.mark.parametrize("damage", [b"", b"FSA1", b"\xff" * 64])
    def test_a_chunk_that_is_no_frame_is_asked_for_again(self, damage: bytes) -> None:
        broken: list[bool] = []

        def spoil(message: Message) -> list[Message]:
            if message.user.get("status") != "206" or len(broken) >= 2:
                return [message]
            broken.append(True)
            return [replace(message, payload=damage)]

        with world(fault=spoil) as here:
            _, tensors = echo(here, bytes_back=BIG)
            assert np.array_equal(tensors["noise"], noise(BIG))
            assert len(here.device.executed) == 1

    def test_lost_credits_cost_one_round_of_ranges_and_not_one_for_every_chunk(self) -> None:
        """After the ranges, the credits must go on behind them and not repeat what has arrived."""
        lost: list[bool] = []

        def lose_two_credits(message: Message) -> list[Message]:
            if channel_of(message) == "ctl" and len(lost) < 2:
                lost.append(True)
                return []
            return [message]

        with world(fault=lose_two_credits, retry_s=0.5) as here:
            count = 20 * CHUNK_BYTES
            _, tensors = echo(here, bytes_back=count)
            assert np.array_equal(tensors["noise"], noise(count))
            # One suffices; a machine that stands still for a moment may add another.
            assert 1 <= len(controls(here, "resend")) <= 3
            assert len(here.sent_to("rsp")) <= 21 + 4

    def test_an_answer_the_device_has_dropped_midway_is_asked_for_anew(self) -> None:
        """It restarted, or its cache was full: it knows the question no more, and answers differently."""

        def drop_after_two(message: Message) -> list[Message]:
            if channel_of(message) == "ctl" and not forgotten:
                forgotten.append(True)
                here.server._answers.clear()
            return [message]

        forgotten: list[bool] = []
        with world(fault=drop_after_two) as here:
            said, tensors = echo(here, bytes_back=BIG)
            assert np.array_equal(tensors["noise"], noise(BIG))
            assert said.times == 2

    def test_random_loss_repetition_and_damage(self) -> None:
        chance = random.Random(7)

        def fault(message: Message) -> list[Message]:
            roll = chance.random()
            if roll < 0.15:
                return []
            if roll < 0.3:
                return [message, message]
            if roll < 0.4 and message.user.get("status") == "206":
                spoilt = bytearray(message.payload)
                spoilt[chance.randrange(200, len(spoilt))] ^= 1
                return [replace(message, payload=bytes(spoilt))]
            return [message]

        with world(fault=fault) as here:
            futures = [
                here.caller.submit(
                    DEVICE,
                    "echo",
                    Ask(text=str(i), bytes_back=BIG if i % 5 == 0 else 10),
                    timeout_s=60,
                )
                for i in range(20)
            ]
            for i, future in enumerate(futures):
                said, tensors = frame.decode(future.result(60), Said)
                assert said.text == str(i)
                count = BIG if i % 5 == 0 else 10
                assert np.array_equal(tensors["noise"], noise(count))
            assert sorted(here.device.executed) == sorted(set(here.device.executed))


def test_a_busy_device_is_asked_again_when_it_said() -> None:
    with world(limits=Limits(max_queued_requests=1)) as here:
        held = here.caller.submit(DEVICE, "hold", Ask(), timeout_s=20)
        assert here.device.begun.acquire(timeout=10)
        queued = here.caller.submit(DEVICE, "echo", Ask(), timeout_s=20)
        refused = here.caller.submit(DEVICE, "echo", Ask(text="patient"), timeout_s=20)
        deadline = time.monotonic() + 10
        while not any(m.user.get("status") == "429" for m in list(here.published)):
            assert time.monotonic() < deadline
        here.device.may_go_on.set()
        assert frame.decode(refused.result(20), Said)[0].text == "patient"
        assert held.result(20)
        assert queued.result(20)
        answered = [m for m in here.sent_to("rsp") if m.user["status"] == "429"]
        assert answered[0].correlation in {m.correlation for m in here.sent_to("req")}


def test_a_device_that_is_busy_is_left_alone_as_long_as_it_said_also_by_who_reconnects() -> None:
    def busy_or_lost(message: Message) -> list[Message]:
        if channel_of(message) != "req":
            return [message]
        if frame.decode(message.payload, Ask)[0].text == "lost":
            return []
        problem = Problem(code=429, message="3 waiting", retry_after_s=60)
        topic = topics.response(COORDINATOR, DEVICE)
        user = {"status": "429", "v": "1.1"}
        answer = replace(message, topic=topic, payload=frame.encode(problem), user=user)
        return [answer]

    with world(fault=busy_or_lost, retry_s=30) as here:

        def tries() -> Counter[str]:
            return Counter(frame.decode(m.payload, Ask)[0].text for m in here.sent_to("req"))

        for text in ("busy", "lost"):
            here.caller.submit(DEVICE, "echo", Ask(text=text), timeout_s=60)
        eventually(lambda: any(p.busy for p in list(here.caller._pending.values())))
        for count in range(2, 5):
            here.caller.device_back(DEVICE)
            eventually(lambda n=count: tries()["lost"] == n)  # type: ignore[misc]
        assert tries()["busy"] == 1


def test_nothing_is_asked_again_while_there_is_no_connection() -> None:
    broker = MemoryBroker()
    line = Line(broker)
    heard = broker.connect()
    requests: list[Message] = []
    heard.subscribe(topics.requests(DEVICE), requests.append)
    caller = Caller(line, COORDINATOR, retry_s=0.02, tick_s=TICK_S)
    try:
        line.cut()
        future = caller.submit(DEVICE, "echo", Ask(), timeout_s=0.5)
        with pytest.raises(Unreachable):
            future.result(10)
        assert [channel_of(m) for m in line.waiting] == ["req", "ctl"]  # it, and its end
        later = caller.submit(DEVICE, "echo", Ask(), timeout_s=60)
        line.mend()
        eventually(lambda: len(requests) > 3)
        caller.cancel(later)
    finally:
        caller.close()
        line.close()
        heard.close()


def test_a_device_that_stays_busy_is_called_busy_and_not_silent() -> None:
    with world(limits=Limits(max_queued_requests=0)) as here, pytest.raises(Busy, match="waiting"):
        here.caller.call(DEVICE, "echo", Ask(), answer=Said, timeout_s=0.3)


def test_silence_ends_at_the_deadline_with_the_device_and_the_method() -> None:
    with world(fault=lambda m: []) as here:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="d1 did not answer echo within"):
            here.caller.call(DEVICE, "echo", Ask(), answer=Said, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - began < 5
        assert len(here.sent_to("req")) > 1


def test_a_retry_expires_with_the_question_and_not_later() -> None:
    with world(fault=lambda m: []) as here:
        future = here.caller.submit(DEVICE, "echo", Ask(), timeout_s=1.4)
        with pytest.raises(Unreachable):
            future.result(20)
        expiries = [m.expiry_s for m in here.sent_to("req")]
        assert expiries[0] == 2
        assert expiries[-1] == 1


def test_draining_is_raised_at_once() -> None:
    with world() as here:
        here.server.drain()
        with pytest.raises(Draining):
            echo(here)


def test_a_device_that_is_gone_ends_what_it_was_asked_and_nothing_else() -> None:
    with world() as here:
        held = here.caller.submit(DEVICE, "hold", Ask(), timeout_s=60)
        other = here.caller.submit("d2", "echo", Ask(), timeout_s=60)
        assert here.device.begun.acquire(timeout=10)
        here.caller.device_gone(DEVICE, "went offline")
        with pytest.raises(Unreachable, match="d1 went offline while it was asked for hold"):
            held.result(10)
        assert not other.done()


def test_an_abandoned_call_is_cancelled_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with world() as here:
        first = here.caller.submit(DEVICE, "hold", Ask(), timeout_s=60)
        assert here.device.begun.acquire(timeout=10)
        submit = here.caller.submit

        def interrupted(*args: object, **more: object) -> object:
            future = submit(*args, **more)  # type: ignore[arg-type]

            def result(timeout: float | None = None) -> bytes:
                raise KeyboardInterrupt

            monkeypatch.setattr(future, "result", result)
            return future

        monkeypatch.setattr(here.caller, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.caller.call(DEVICE, "echo", Ask(text="unwanted"), answer=Said)
        monkeypatch.setattr(here.caller, "submit", submit)
        assert len(controls(here, "cancel")) == 1
        here.device.may_go_on.set()
        assert first.result(10)
        echo(here, text="wanted")
        assert here.device.executed == ["", "wanted"]


def test_a_future_cannot_be_cancelled_from_under_the_watch() -> None:
    with world(fault=lambda m: []) as here:
        future = here.caller.submit(DEVICE, "echo", Ask(), timeout_s=0.2)
        assert not future.cancel()
        with pytest.raises(Unreachable):
            future.result(10)
        # The thread that keeps deadlines has survived.
        with pytest.raises(Unreachable):
            here.caller.submit(DEVICE, "echo", Ask(), timeout_s=0.2).result(10)


def test_an_answer_too_large_for_this_side_is_refused_before_memory_is_taken() -> None:
    with world(max_answer_bytes=2 * CHUNK_BYTES) as here, pytest.raises(TooLarge, match="takes"):
        echo(here, bytes_back=BIG)


def test_a_request_too_large_to_send_says_so_and_is_not_retried() -> None:
    with world() as here:
        with pytest.raises(TooLarge):
            here.caller.call(
                DEVICE, "echo", Ask(), {"a": np.zeros(MAX_PACKET_BYTES, np.uint8)}, answer=Said
            )
        assert here.caller._pending == {}
        assert here.published == []


@pytest.mark.parametrize("name", ["", "a/b", "+"])
def test_an_unusable_id_is_a_usage_error(name: str) -> None:
    transport = MemoryBroker().connect()
    with pytest.raises(UsageError):
        Caller(transport, name)
    transport.close()


def test_closing_ends_what_is_waiting_and_refuses_more() -> None:
    transport = MemoryBroker().connect()
    caller = Caller(transport, COORDINATOR, tick_s=TICK_S)
    future = caller.submit(DEVICE, "echo", Ask(), timeout_s=60)
    caller.close()
    with pytest.raises(Unreachable, match="closed"):
        future.result(1)
    with pytest.raises(Unreachable, match="closed"):
        caller.submit(DEVICE, "echo", Ask())
    transport.close()


def test_bytes_are_counted_by_device_and_method_in_both_directions() -> None:
    with world() as here:
        echo(here, bytes_back=1000)
        counted = here.caller.wire[DEVICE]["echo"]
        assert counted.sent == sum(len(m.payload) for m in here.sent_to("req"))
        assert counted.received == sum(len(m.payload) for m in here.sent_to("rsp")) > 1000


def test_counting_loses_nothing_between_threads() -> None:
    with world(workers=2, limits=Limits(max_queued_requests=10_000)) as here:

        def ask() -> None:
            for _ in range(50):
                here.caller.call(DEVICE, "echo", Ask(), answer=Said, timeout_s=20)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counted = here.caller.wire[DEVICE]["echo"]
        assert counted.sent == sum(len(m.payload) for m in here.sent_to("req"))


class TestAnswers:
    """The iterator: as they come, taken from the source only when they are about to be sent."""

    def test_as_they_come(self) -> None:
        with world(workers=3) as here:
            bodies = [Ask(text=str(i)) for i in range(6)]
            found = {}
            for number, future in here.caller.answers(DEVICE, "echo", bodies, outstanding=3):
                assert future.done()
                found[number] = frame.decode(future.result(), Said)[0].text
            assert found == {i: str(i) for i in range(6)}

    def test_one_that_takes_long_does_not_hold_up_the_others(self) -> None:
        with world(workers=2) as here:
            held = here.caller.submit(DEVICE, "hold", Ask(text="held"), timeout_s=20)
            assert here.device.begun.acquire(timeout=10)
            bodies = (Ask(text=str(i)) for i in range(5))
            numbers = [n for n, _ in here.caller.answers(DEVICE, "echo", bodies, outstanding=2)]
            assert sorted(numbers) == list(range(5))
            assert not held.done()

    def test_no_more_is_taken_than_may_be_outstanding(self) -> None:
        taken: list[int] = []

        def bodies() -> Iterator[Ask]:
            for i in range(10):
                taken.append(i)
                yield Ask(text=str(i))

        with world() as here:
            arriving = here.caller.answers(DEVICE, "echo", bodies(), outstanding=2)
            next(arriving)
            assert taken == [0, 1]
            next(arriving)
            assert taken == [0, 1, 2]
            arriving.close()

    def test_an_error_is_in_its_place_and_the_rest_goes_on(self) -> None:
        with world() as here:
            arriving = here.caller.answers(DEVICE, "fail", [Ask(), Ask()])
            errors = [type(future.exception()) for _, future in arriving]
            assert errors == [RuntimeFailed, RuntimeFailed]

    def test_closing_it_cancels_what_is_outstanding(self) -> None:
        with world() as here:
            held = here.caller.submit(DEVICE, "hold", Ask(), timeout_s=20)
            assert here.device.begun.acquire(timeout=10)
            arriving = here.caller.answers(DEVICE, "hold", [Ask(text="unwanted")] * 3)
            waiting = threading.Thread(target=lambda: list(arriving))
            waiting.start()
            end = time.monotonic() + 10
            while len(here.sent_to("req")) < 3:
                assert time.monotonic() < end
            here.device.may_go_on.set()
            waiting.join(10)
            again = here.caller.answers(DEVICE, "echo", [Ask(text="x")] * 3, outstanding=3)
            next(again)
            again.close()
            assert held.result(10)
            assert here.caller._pending == {}


def test_a_transport_that_fails_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(fault=lambda m: [] if channel_of(m) == "req" else [m], retry_s=0.05) as here:
        future = here.caller.submit(DEVICE, "echo", Ask(), timeout_s=0.6)
        publish = here.caller._transport.publish
        broken = threading.Event()

        def fails(message: Message) -> None:
            broken.set()
            raise OSError("no buffer space")

        monkeypatch.setattr(here.caller._transport, "publish", fails)
        assert broken.wait(10)
        with pytest.raises(Unreachable):
            future.result(10)
        monkeypatch.setattr(here.caller._transport, "publish", publish)
        assert here.caller._watch.is_alive()


def test_a_device_that_is_back_is_asked_again_at_once() -> None:
    with world(fault=once(lambda m: channel_of(m) == "req"), retry_s=60) as here:
        future = here.caller.submit(DEVICE, "echo", Ask(text="lost"), timeout_s=30)
        here.caller.device_back(DEVICE)
        assert frame.decode(future.result(10), Said)[0].text == "lost"


class TestSpeed:
    """Of the link, which what the device spends must not make look slow."""

    def test_of_an_upload_without_what_the_device_spent_on_it(self) -> None:
        with world(retry_s=30) as here:
            future = here.caller.submit(
                DEVICE, "hold", Ask(), {"a": np.zeros(900_000, np.uint8)}, timeout_s=20
            )
            assert here.device.begun.acquire(timeout=10)
            threading.Timer(0.5, here.device.may_go_on.set).start()
            assert future.result(10)
            speed = here.caller.traffic.speed(DEVICE)
            assert speed is not None
            assert speed > 900_000 / 0.25

    def test_of_a_chunked_answer(self) -> None:
        with world() as here:
            assert here.caller.traffic.speed(DEVICE) is None
            echo(here, bytes_back=BIG)
            speed = here.caller.traffic.speed(DEVICE)
            assert speed is not None
            assert speed > 1e6

    @pytest.mark.parametrize("said", ["", "nan", "-5", "x", "1e400"])
    def test_a_device_that_says_nonsense_is_not_measured(self, said: str) -> None:
        def spoil(message: Message) -> list[Message]:
            if channel_of(message) != "rsp":
                return [message]
            return [replace(message, user={**message.user, "ms": said})]

        with world(fault=spoil) as here:
            here.caller.call(DEVICE, "echo", Ask(), {"a": np.zeros(900_000, np.uint8)}, answer=Said)
            assert here.caller.traffic.speed(DEVICE) is None
