"""Plays a protocol case: one side is under test, the other is played by hand, message by message.

A case is a YAML document: `name`, `why`, `under_test` (server or client), `prologue`, and `steps`, each of
which is an action (send something) or an expectation (wait for something, with a deadline). What the steps
may say is what the methods below take. They run over any pair of transports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from edge_teacher.contract import frame, topics
from edge_teacher.contract.limits import CHUNK_BYTES, Limits
from edge_teacher.contract.messages import Control, Problem
from edge_teacher.rpc import chunks
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message, Transport
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Device, Said, noise

WAIT_S = 15
Connect = Callable[[str], Transport]
"""Client id -> an open connection."""


class Heard:
    """What the side that is played has received, in order of arrival."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._arrived = threading.Condition()

    def note(self, message: Message) -> None:
        with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    def take(self, wanted: Callable[[Message], bool], what: object) -> Message:
        """The first that fits, and no more among those to come."""

        def found() -> Message | None:
            return next((m for m in self.messages if wanted(m)), None)

        with self._arrived:
            assert self._arrived.wait_for(lambda: found() is not None, WAIT_S), (
                f"{what} did not come; there is {self.messages}"
            )
            message = found()
            assert message is not None
            self.messages.remove(message)
            return message


def check(body: msgspec.Struct, wanted: dict[str, Any]) -> None:
    have = msgspec.to_builtins(body)
    for field, value in wanted.items():
        assert have.get(field) == value, f"{field} is {have.get(field)!r}, not {value!r}"


class Play:
    """The steps both kinds of case have in common."""

    def run(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            ((name, arguments),) = step.items()
            do = getattr(self, name)
            if isinstance(arguments, dict):
                do(**arguments)
            elif arguments is None:
                do()
            else:
                do(arguments)


class ServerPlay(Play):
    """A server is under test; coordinators are played."""

    def __init__(self, connect: Connect, ends: ExitStack, prologue: dict[str, Any]) -> None:
        self.device = Device()
        self.heard = Heard()
        self.peer = connect("peer")
        for name in ("ada", "bob"):
            self.peer.subscribe(topics.responses(name), self.heard.note)
            self.peer.subscribe(topics.all_data(name), self.heard.note)
        control, bulk = connect(DEVICE), connect(DEVICE + ":bulk")
        self.server = Server(
            control,
            DEVICE,
            self.device.methods(),
            limits=Limits(**prologue.get("limits", {})),
            allowed=frozenset(prologue.get("allowed", ())),
            bulk=bulk,
        )
        ends.callback(lambda: [t.close() for t in (self.peer, control, bulk)])
        ends.callback(self.server.drain)
        ends.callback(self.device.may_go_on.set)
        self.server.start()

    def ask(
        self,
        id: str,
        method: str = "echo",
        body: dict[str, Any] | None = None,
        by: str = "ada",
        v: str = "1.3",
        expiry_s: int | None = None,
        channel: str = "req",
        payload: str | None = None,
        respond_to: str | None = None,
        accept: str = "",
    ) -> None:
        raw = frame.encode(Ask(**(body or {}))) if payload is None else payload.encode()
        user = {"v": v, "src": by} if v else {"src": by}
        self.peer.publish(
            Message(
                topic=f"fedsa/v1/{DEVICE}/{channel}/{method}",
                payload=raw,
                response_topic=topics.response(by, DEVICE) if respond_to is None else respond_to,
                correlation=id.encode(),
                expiry_s=expiry_s,
                user=user | ({"accept": accept} if accept else {}),
            )
        )

    def control(self, id: str, kind: str, by: str = "ada", **more: Any) -> None:
        control = Control(
            kind=kind,  # type: ignore[arg-type]
            correlation=id.encode(),
            respond_to=topics.response(by, DEVICE),
            **more,
        )
        self.peer.publish(Message(topic=topics.control(DEVICE), payload=frame.encode(control)))

    def raw_control(self, payload: str) -> None:
        self.peer.publish(Message(topic=topics.control(DEVICE), payload=payload.encode("latin1")))

    def begun(self) -> None:
        """A `hold` is being computed."""
        assert self.device.begun.acquire(timeout=WAIT_S)

    def release(self) -> None:
        """Let every `hold` go on."""
        self.device.may_go_on.set()

    def expect(
        self,
        id: str,
        status: int,
        by: str = "ada",
        body: dict[str, Any] | None = None,
        says: str = "",
        retry_after: bool = False,
    ) -> None:
        message = self.heard.take(
            lambda m: (
                m.correlation == id.encode()
                and m.user.get("status") == str(status)
                and m.topic == topics.response(by, DEVICE)
            ),
            (id, status),
        )
        if status == 200:
            check(frame.decode(message.payload, Said)[0], body or {})
            return
        problem, _ = frame.decode(message.payload, Problem)
        assert problem.code == status
        assert says in problem.message
        assert (problem.retry_after_s is not None) == retry_after

    def expect_chunk(self, id: str, number: int, channel: str = "data", by: str = "ada") -> None:
        topic = (topics.data if channel == "data" else topics.response)(by, DEVICE)

        def fits(message: Message) -> bool:
            if message.topic != topic or message.user.get("status") != "206":
                return False
            chunk, _ = frame.decode(message.payload, chunks.Chunk)
            return message.correlation == id.encode() and chunk.offset == number * CHUNK_BYTES

        self.heard.take(fits, (id, "chunk", number))

    def expect_silence(self) -> None:
        """Everything sent so far has been handled, on both connections, and nothing else came of it."""
        for channel in ("req", "put"):
            self.ask("fence", "no_such_method", channel=channel)
            self.expect("fence", 404, says="names no method")
        assert self.heard.messages == []

    def executed(self, wanted: list[str]) -> None:
        assert self.device.executed == wanted

    def holds_nothing(self) -> None:
        """No answer is kept in memory, and nothing waits."""
        assert self.server._answers.nbytes == 0
        assert self.server._known == {}

    def drain(self) -> None:
        self.server.drain(0.1)


class ClientPlay(Play):
    """A client is under test; the device is played."""

    def __init__(self, connect: Connect, ends: ExitStack, prologue: dict[str, Any]) -> None:
        self.heard = Heard()
        self.peer = connect("peer")
        for topic_filter in (topics.requests(DEVICE), topics.puts(DEVICE), topics.control(DEVICE)):
            self.peer.subscribe(topic_filter, self.heard.note)
        control, bulk = connect("ada"), connect("ada:bulk")
        options: dict[str, Any] = {"retry_s": 30, "tick_s": 0.02, **prologue}
        self.caller = Caller(control, "ada", bulk=bulk, **options)
        ends.callback(lambda: [t.close() for t in (self.peer, control, bulk)])
        ends.callback(self.caller.close)
        self.futures: dict[str, Future[frame.Payload]] = {}
        self.requests: dict[str, Message] = {}

    def call(
        self,
        id: str,
        method: str = "echo",
        body: dict[str, Any] | None = None,
        timeout_s: float = 20,
        packed: bool = False,
        bytes_along: int = 0,
    ) -> None:
        tensors = {"a": noise(bytes_along)} if bytes_along else None
        self.futures[id] = self.caller.submit(
            DEVICE, method, Ask(**(body or {})), tensors, timeout_s=timeout_s, packed=packed
        )

    def cancel(self, id: str) -> None:
        self.caller.cancel(self.futures[id])

    def expect_request(
        self,
        save: str,
        method: str = "echo",
        channel: str = "req",
        same_as: str | None = None,
        user: dict[str, str] | None = None,
        expiry_s: int | None = None,
    ) -> None:
        topic = f"fedsa/v1/{DEVICE}/{channel}/{method}"
        message = self.heard.take(lambda m: m.topic == topic, topic)
        assert message.response_topic == topics.response("ada", DEVICE)
        assert len(message.correlation) == 16
        if same_as is not None:
            assert message.correlation == self.requests[same_as].correlation
        if expiry_s is not None:
            assert message.expiry_s == expiry_s
        for key, value in (user or {}).items():
            assert message.user.get(key) == value
        self.requests[save] = message

    def reply(
        self,
        to: str,
        status: int = 200,
        body: dict[str, Any] | None = None,
        payload: str | None = None,
        v: str = "1.3",
        device: str = DEVICE,
    ) -> None:
        fields = body or {}
        said: msgspec.Struct = (
            Said(**{"text": "", "times": 1, **fields})
            if status == 200
            else Problem(**{"code": status, "message": "", **fields})
        )
        raw = frame.encode(said) if payload is None else payload.encode("latin1")
        self._send(to, topics.response("ada", device), status, raw, v)

    def reply_chunk(
        self,
        to: str,
        number: int,
        bytes: int,
        damage: str = "",
        channel: str = "data",
        total: int | None = None,
    ) -> None:
        """One chunk of the answer with `bytes` of noise: as it should be, or damaged."""
        whole = frame.encode_parts(Said(text="big", times=1), {"noise": noise(bytes)})
        offset = number * CHUNK_BYTES
        length = min(CHUNK_BYTES, whole.nbytes - offset)
        raw = chunks.cut(whole, offset, length, whole.sha256())
        if damage == "flip":
            raw = raw[:-1] + chr(raw[-1] ^ 1).encode("latin1")
        elif damage == "truncate":
            raw = raw[: len(raw) // 2]
        if total is not None:
            chunk, tensors = frame.decode(raw, chunks.Chunk)
            raw = frame.encode(msgspec.structs.replace(chunk, total_bytes=total), tensors)
        topic = (topics.data if channel == "data" else topics.response)("ada", DEVICE)
        self._send(to, topic, 206, raw, "1.3" if channel == "data" else "1.0")

    def expect_control(self, kind: str, of: str, ranges: list[int] | None = None) -> None:
        def fits(message: Message) -> bool:
            if message.topic != topics.control(DEVICE):
                return False
            control, _ = frame.decode(message.payload, Control)
            if control.kind != kind or control.correlation != self.requests[of].correlation:
                return False
            return ranges is None or [o // CHUNK_BYTES for o, _ in control.ranges] == ranges

        self.heard.take(fits, (kind, of, ranges))

    def expect_result(
        self, id: str, body: dict[str, Any] | None = None, noise_bytes: int | None = None
    ) -> None:
        said, tensors = self.caller.decode(self.futures[id].result(WAIT_S), Said)
        check(said, body or {})
        if noise_bytes is not None:
            assert np.array_equal(tensors["noise"], noise(noise_bytes))

    def expect_error(self, id: str, kind: str, says: str = "") -> None:
        error = self.futures[id].exception(WAIT_S)
        assert type(error).__name__ == kind, repr(error)
        assert says in str(error)

    def expect_waiting(self, id: str) -> None:
        """Whatever was sent so far has been handled, and is no answer to this."""
        self.call("fence", "fence")
        self.expect_request("fence", "fence")
        self.reply("fence")
        self.expect_result("fence")
        assert not self.futures[id].done()

    def expect_waiting_unsent(self, id: str) -> None:
        """The client keeps it to itself."""
        assert not self.futures[id].done()
        assert self.heard.messages == []
        assert self.caller._unsent[DEVICE]

    def expect_silence(self) -> None:
        """The client has sent nothing that was not expected."""
        self.call("fence", "fence")
        self.expect_request("fence", "fence")
        self.reply("fence")
        self.expect_result("fence")
        assert self.heard.messages == []

    def holds_nothing(self) -> None:
        assert self.caller._pending == {}
        assert self.caller._memory.taken == 0

    def _send(self, to: str, topic: str, status: int, payload: bytes, v: str) -> None:
        request = self.requests[to]
        user = {"status": str(status), "src": DEVICE} | ({"v": v} if v else {})
        answer = Message(topic=topic, payload=payload, correlation=request.correlation, user=user)
        self.peer.publish(replace(answer, qos=1))


def play(case: dict[str, Any], connect: Connect) -> None:
    kind = {"server": ServerPlay, "client": ClientPlay}[case["under_test"]]
    with ExitStack() as ends:
        kind(connect, ends, case.get("prologue", {})).run(case["steps"])
