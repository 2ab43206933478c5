"""One agent: a teacher, a connection, and the life between birth and a clean shutdown."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_teacher import __version__
from edge_teacher import bundle as bundles
from edge_teacher.agent.answers import ENCODINGS, Answers
from edge_teacher.agent.image_store import ImageStore
from edge_teacher.agent.telemetry import rss_bytes, temperature_c
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Card, State, Telemetry
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.pair import connect_pair
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message, Transport
from edge_teacher.runtime import LiveSession, Model, dialects, open_session
from edge_teacher.runtime.bundled import teacher_model
from edge_teacher.slots import Students

log = logging.getLogger(__name__)

BULK_GRACE_S = 2.0
"""After that a device is born without its second connection: what is large then takes the first."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    device: str
    bundle: Path
    owners: list[Ed25519PublicKey]
    """Keys whose teachers this device loads."""
    coordinator_keys: list[Ed25519PublicKey]
    """Keys whose students this device installs; without one it takes none."""
    state: Path
    allowed: frozenset[str] = frozenset()
    threads: int = 1
    telemetry_s: float = 5.0
    limits: Limits = field(default_factory=Limits)


class Agent:
    """Loads and verifies everything before it says it is there. Raises what a wrong bundle raises."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._since = time.time()
        self._began = time.monotonic()
        self._session_id = secrets.token_hex(8)
        bundle = bundles.read(config.bundle, config.owners)
        if not isinstance(bundle.card, TeacherCard):
            raise CheckFailed(f"{config.bundle} holds a student; an agent runs a teacher")
        self.teacher = bundle.card.teacher
        self._bundle_digest = bundle.digest
        self._server: Server | None = None
        self._stopped = threading.Event()
        self._session = self._open(teacher_model(bundle))
        self._check_outputs()
        self._images = ImageStore(config.limits)
        self._students = Students(
            _writable(config.state / "students"),
            config.coordinator_keys,
            self._open,
            dialects=dialects(),
            max_bundle_bytes=config.limits.max_bundle_bytes,
        )
        self._transport: Transport | None = None
        self._bulk: Transport | None = None
        self._waits_for_bulk = False
        self._telemetry_thread = threading.Thread(
            target=self._telemetry, name="telemetry", daemon=True
        )

    def card(self) -> Card:
        return Card(
            device=self.config.device,
            bundle=self._bundle_digest,
            teacher=self.teacher,
            runtime=self._session.info,
            limits=self.config.limits,
            students=self._students.statuses(),
            encodings=ENCODINGS,
        )

    def will(self) -> Message:
        """What the broker says when this process dies."""
        return self._state(online=False)

    def start(self, transport: Transport, bulk: Transport | None = None) -> None:
        """Answer on `transport`, then announce the card and the birth, now and after each reconnect.

        `bulk`: a second connection for data; none: the same one.
        """
        answers = Answers(
            self.teacher,
            self._session,
            self._images,
            self._students,
            self.card,
            self._announce_card,
            max_answer_bytes=self.config.limits.max_answer_bytes,
        )
        self._transport = transport
        self._bulk = bulk
        self._server = Server(
            transport,
            self.config.device,
            answers.methods(),
            limits=self.config.limits,
            allowed=self.config.allowed,
            bulk=bulk,
        )
        self._server.start()
        transport.on_connect(self._connected)
        if bulk is not None and bulk is not transport:
            bulk.on_connect(self._bulk_connected)
        self._telemetry_thread.start()

    def stop(self) -> None:
        """503 to what waits, finish what is computed, say goodbye, disconnect. Again: nothing more."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._server is not None:
            self._server.drain()
            self._telemetry_thread.join()
        for opened in (self._session, self._students):
            opened.close()
        if self._bulk is not None and self._bulk is not self._transport:
            self._bulk.close()
        if self._transport is not None:
            self._transport.publish(self._state(online=False, leaving=True))
            self._transport.close()
        log.info("%s has stopped", self.config.device)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _open(self, model: Model) -> LiveSession:
        return open_session(
            model,
            threads=self.config.threads,
            engines=self.config.state / "engines",
            changed=self._runtime_changed,
        )

    def _runtime_changed(self) -> None:
        """Another runtime answers, or one was given up: the card says which."""
        if self._server is not None and not self._stopped.is_set():
            self._announce_card()

    def _check_outputs(self) -> None:
        wanted = {"saliency", *(f"features.{tap}" for tap in self.teacher.taps)}
        missing = wanted - set(self._session.outputs)
        if missing:
            raise CheckFailed(
                f"the graph in {self.config.bundle} lacks the outputs {', '.join(sorted(missing))} "
                "that its card promises; export it again"
            )

    def _state(self, *, online: bool, leaving: bool = False) -> Message:
        state = State(
            online=online,
            leaving=leaving,
            session=self._session_id,
            software=f"edge-teacher {__version__}",
            protocol=PROTOCOL,
            since_unix_s=self._since,
        )
        topic = topics.state(self.config.device)
        return Message(topic=topic, payload=frame.encode(state), retain=True)

    def _publish(self, topic: str, body: msgspec.Struct, *, qos: int, retain: bool) -> None:
        if self._transport is not None:
            self._transport.publish(
                Message(topic=topic, payload=frame.encode(body), qos=qos, retain=retain)
            )

    def _announce_card(self) -> None:
        self._publish(topics.card(self.config.device), self.card(), qos=1, retain=True)

    def _connected(self) -> None:
        """Who hears the birth may ask something large at once: it is said when both connections are there."""
        if self._bulk is None or self._bulk.connected:
            self._announce()
            return
        self._waits_for_bulk = True
        timer = threading.Timer(BULK_GRACE_S, self._bulk_connected)
        timer.daemon = True
        timer.start()

    def _bulk_connected(self) -> None:
        if self._waits_for_bulk and self._transport is not None and self._transport.connected:
            self._announce()

    def _announce(self) -> None:
        self._waits_for_bulk = False
        if self._stopped.is_set():
            return  # reconnected while saying goodbye
        # The card first: whoever hears the birth finds it there.
        self._announce_card()
        if self._transport is not None:
            self._transport.publish(self._state(online=True))
        log.info("%s serves %s", self.config.device, self.teacher.name)

    def _telemetry(self) -> None:
        while not self._stopped.wait(self.config.telemetry_s):
            assert self._server is not None
            counters = self._server.counters
            telemetry = Telemetry(
                uptime_s=round(time.monotonic() - self._began, 1),
                rss_bytes=rss_bytes(),
                load_1min=os.getloadavg()[0],
                temperature_c=temperature_c(),
                queued=self._server.queued,
                answered=counters.answered,
                refused=counters.refused,
                failed=counters.failed,
                images_held=len(self._images),
            )
            self._publish(topics.telemetry(self.config.device), telemetry, qos=0, retain=False)


def _writable(folder: Path) -> Path:
    """Known now, and not when the first student comes. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UsageError(
            f"the folder for students {folder} cannot be used: {error.strerror}"
        ) from error


def serve(config: AgentConfig, address: BrokerAddress, stop: threading.Event) -> None:
    """Run an agent over MQTT until `stop` is set."""
    agent = Agent(config)
    pair = connect_pair(address, config.device, will=agent.will())
    agent.start(pair.control, pair.bulk)
    try:
        stop.wait()
    finally:
        agent.stop()
