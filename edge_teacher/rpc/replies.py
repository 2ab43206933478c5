"""How answers and refusals leave a device: what is sent at once, what in chunks, on which connection."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import RpcError
from edge_teacher.contract.limits import BULK_ABOVE_BYTES, CHUNK_ABOVE_BYTES
from edge_teacher.contract.messages import Problem
from edge_teacher.contract.versions import BULK_SINCE
from edge_teacher.rpc.answer_cache import Answered
from edge_teacher.rpc.fair_queue import Job, Key
from edge_teacher.rpc.outbox import Outbox
from edge_teacher.rpc.transport import Message, Transport


class Replies:
    """Everything one device says to who has asked it."""

    def __init__(self, device: str, transport: Transport, bulk: Transport) -> None:
        self.outbox = Outbox(bulk, self._publish_chunk)
        self._device = device
        self._transport = transport
        self._bulk = bulk

    def send(self, key: Key, done: Answered, *, job: Job | None = None) -> None:
        """`job`: it has just been computed; None: it is asked for again."""
        if done.sha256:
            self.outbox.begin(key, done)
            return
        # If it is lost, the request comes again; only then is the acknowledgement worth its time.
        small = done.payload.nbytes <= BULK_ABOVE_BYTES
        qos = 0 if small and job is not None and self._transport.connected else 1
        # What the asker has to take off before it knows how long the wire took.
        spent = {} if job is None else {"ms": f"{(time.monotonic() - job.arrived) * 1e3:.3f}"}
        payload = done.payload.join()
        self._publish(
            self._transport, key.respond_to, key, done.status, payload, qos=qos, user=spent
        )

    def refuse(self, key: Key, error: RpcError) -> None:
        payload = problem_frame(error)
        self._publish(self._transport, key.respond_to, key, error.code, payload)

    def _publish_chunk(self, key: Key, answer: Answered, chunk: bytes) -> None:
        asker = topics.parse(key.respond_to)
        apart = answer.minor >= BULK_SINCE and asker is not None
        topic = topics.data(asker.owner, self._device) if apart and asker else key.respond_to
        transport = self._bulk if self._bulk.connected else self._transport
        self._publish(transport, topic, key, 206, chunk)

    def _publish(
        self,
        transport: Transport,
        topic: str,
        key: Key,
        status: int,
        payload: bytes,
        *,
        qos: int = 1,
        user: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        transport.publish(
            Message(
                topic=topic,
                payload=payload,
                qos=qos,
                correlation=key.correlation,
                user={"status": str(status), "v": PROTOCOL, "src": self._device, **user},
            )
        )


def as_sent(
    payload: frame.Encoded, *, minor: int, command: bool, on_its_way_until: float
) -> Answered:
    """What fits one message is joined at once; what does not is named by its SHA-256."""
    if payload.nbytes <= CHUNK_ABOVE_BYTES:
        joined = payload.join()
        small = frame.Encoded((joined,), len(joined))
        return Answered(small, minor=minor, of_a_command=command)
    return Answered(payload, payload.sha256(), minor, on_its_way_until)


def problem_frame(error: RpcError) -> bytes:
    return frame.encode(
        Problem(code=error.code, message=str(error), retry_after_s=error.retry_after_s)
    )
