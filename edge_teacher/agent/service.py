"""One agent: a teacher, a connection, and the life between birth and a clean shutdown."""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_teacher import __version__
from edge_teacher import bundle as bundles
from edge_teacher.agent.answers import ENCODINGS
from edge_teacher.agent.serving import Serving
from edge_teacher.agent.telemetry import Machines
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import CheckFailed, RpcError, UsageError
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import AnswerTimes, Card, State, Telemetry
from edge_teacher.rpc.latency import Latency
from edge_teacher.rpc.serve import Counters, Server
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
    """Those that the memory cannot hold are announced and kept smaller."""
    memory_bytes: int | None = None
    """The most this process may have resident; None: nine tenths of what the machine or its control group
    allows."""
    sysfs: Path = Path("/sys")
    """Where temperatures, power and throttling are seen."""
    tegrastats: str = "tegrastats"
    """The command asked for what /sys does not tell."""


class Agent:
    """Loads and verifies everything before it says it is there. Raises what a wrong bundle raises."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._began = time.monotonic()
        self._session_id = secrets.token_hex(8)
        bundle = bundles.read(config.bundle, config.owners)
        if not isinstance(bundle.card, TeacherCard):
            raise CheckFailed(f"{config.bundle} holds a student; an agent runs a teacher")
        self.teacher = bundle.card.teacher
        self._bundle_digest = bundle.digest
        self._server: Server | None = None
        self._whole = threading.Event()
        """Everything here is made: before, a runtime that is ready early has nobody to tell."""
        self._stopped = threading.Event()
        self._session = self._open(teacher_model(bundle))
        self._check_outputs()
        self._machines = Machines(
            sysfs=config.sysfs, tegrastats=config.tegrastats, interval_s=config.telemetry_s
        )
        self._serving = Serving(
            self.teacher,
            self._session,
            config.limits,
            self._machines.throttling,
            memory_bytes=config.memory_bytes,
        )
        self._students = Students(
            _writable(config.state / "students"),
            config.coordinator_keys,
            self._open,
            dialects=dialects(),
            max_bundle_bytes=self._serving.limits.max_bundle_bytes,
        )
        self._methods, self._engine = self._serving.begin(
            self._students, self.card, self._announce_card
        )
        self._transport: Transport | None = None
        self._bulk: Transport | None = None
        self._lock = threading.Lock()
        """Of start, stop and reconfigure: they come from different threads."""
        self._waits_for_bulk = False
        self._telemetry_thread = threading.Thread(
            target=self._telemetry, name="telemetry", daemon=True
        )
        self._whole.set()

    def card(self) -> Card:
        return Card(
            device=self.config.device,
            bundle=self._bundle_digest,
            teacher=self.teacher,
            runtime=self._session.info,
            limits=self._serving.limits,
            students=self._students.statuses(),
            encodings=ENCODINGS,
        )

    def telemetry(self) -> Telemetry:
        """How the device is at this moment."""
        server, machine = self._server, self._machines.read()
        counters = Counters() if server is None else server.counters
        times = {} if server is None else server.latencies.told()
        throttling = machine.throttling
        return Telemetry(
            uptime_s=round(time.monotonic() - self._began, 1),
            rss_bytes=machine.rss_bytes,
            load_1min=machine.load_1min,
            temperature_c=machine.temperature_c,
            queued=0 if server is None else server.queued,
            answered=counters.answered,
            refused=counters.refused,
            failed=counters.failed,
            images_held=len(self._serving.images),
            temperatures_c=machine.temperatures_c,
            power_w=machine.power_w,
            gpu_load=machine.gpu_load,
            memory_available_bytes=machine.memory_available_bytes,
            memory_limit_bytes=machine.memory_limit_bytes,
            throttled=None if throttling is None else throttling.throttled,
            throttling="" if throttling is None else throttling.reason,
            answer_times={method: _told(latency) for method, latency in times.items()},
            # Why others are not used is in the card, and need not be said every few seconds.
            runtime=msgspec.structs.replace(self._session.info, why_not={}),
            unavailable=machine.unavailable,
        )

    @property
    def answered(self) -> int:
        """Requests answered since the start."""
        return 0 if self._server is None else self._server.counters.answered

    def will(self) -> Message:
        """What the broker says when this process dies."""
        return self._state(online=False)

    def start(self, transport: Transport, bulk: Transport | None = None) -> None:
        """Answer on `transport`, then announce the card and the birth, now and after each reconnect.

        `bulk`: a second connection for data; none: the same one. Raises Unreachable if the broker does not
        let it hear questions: then it may be started again, on other connections.
        """
        with self._lock:
            if self._stopped.is_set():
                return
            server = Server(
                transport,
                self.config.device,
                self._methods,
                limits=self._serving.limits,
                allowed=self.config.allowed,
                engine=self._engine,
                bulk=bulk,
            )
            self._transport = transport
            self._bulk = bulk
            try:
                server.start()
            except RpcError:
                server.drain()
                self._transport = self._bulk = None
                raise
            self._server = server
            self._machines.start()
            self._telemetry_thread.start()
        transport.on_connect(self._connected)
        if bulk is not None and bulk is not transport:
            bulk.on_connect(self._bulk_connected)

    def check_limits(self, config: AgentConfig) -> None:
        """Raises UsageError for a memory ceiling that leaves nothing beside the teacher."""
        self._serving.check_ceiling(config.memory_bytes)

    def reconfigure(self, config: AgentConfig) -> None:
        """Take from `config` what can change while it runs: coordinators, their keys, limits, the period.

        The rest is as it was. Whoever watches learns of other limits from the card. Raises what
        `check_limits` does; then nothing has changed.
        """
        with self._lock:
            before = self._serving.limits
            self._serving.limit(config.limits, config.memory_bytes)
            self.config = replace(
                self.config,
                allowed=config.allowed,
                coordinator_keys=config.coordinator_keys,
                limits=config.limits,
                memory_bytes=config.memory_bytes,
                telemetry_s=config.telemetry_s,
            )
            self._bound()
        if self._serving.limits != before:
            self._announce_card()

    def stuck(self, longest_s: float) -> str:
        """What makes no progress any more, as a sentence; empty where all is well. See Server.stuck."""
        with self._lock:
            server = self._server
        if server is None or self._stopped.is_set():
            return ""
        if not self._telemetry_thread.is_alive():
            return "the telemetry's thread has ended"
        return server.stuck(longest_s)

    def stop(self) -> None:
        """503 to what waits, finish what is computed, say goodbye, disconnect. Again: nothing more."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        with self._lock:  # a start that is under way ends first
            server = self._server
        if server is not None:
            server.drain()
            self._telemetry_thread.join()
            self._machines.stop()
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
        if not self._whole.is_set() or self._stopped.is_set():
            return
        with self._lock:
            self._serving.runtime_changed(self._session.grown_bytes)
            self._bound()
            serves = self._server is not None
        if serves:
            self._announce_card()

    def _bound(self) -> None:
        """The limits as they are now, for whoever keeps a copy."""
        limits = self._serving.limits
        self._students.reconfigure(self.config.coordinator_keys, limits.max_bundle_bytes)
        if self._server is not None:
            self._server.reconfigure(limits, self.config.allowed)

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
            # Told anew each time: a device often starts before it knows what time it is.
            since_unix_s=time.time() - (time.monotonic() - self._began),
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
            # Without a connection it would only be old news with the next.
            if self._transport is not None and self._transport.connected:
                topic = topics.telemetry(self.config.device)
                self._publish(topic, self.telemetry(), qos=0, retain=False)


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


def _told(latency: Latency) -> AnswerTimes:
    p50, p99 = latency.p50_ms, latency.p99_ms
    return AnswerTimes(
        count=latency.count,
        total_s=round(latency.total_s, 6),
        p50_ms=None if p50 is None else round(p50, 3),
        p99_ms=None if p99 is None else round(p99, 3),
    )
