"""The whole process as systemd starts it: without a network, with one, reloaded, and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client.parser import text_string_to_metric_families

from edge_teacher.agent.connecting import Connecting
from edge_teacher.agent.daemon import Daemon
from edge_teacher.agent.settings import File, source
from edge_teacher.agent.systemd import notifier
from edge_teacher.contract import frame, topics
from edge_teacher.contract.errors import NotAllowed
from edge_teacher.contract.messages import Card, Empty, Telemetry
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from tests.brokers import Authority, Mosquitto, free_port
from tests.edge_teacher.agent.test_systemd import Manager
from tests.edge_teacher.nets import COORDINATOR, OWNER, TEACHER, teacher_bundle
from tests.edge_teacher.rpc.test_paho import Inbox
from tests.edge_teacher.test_cli import command, environment, save_public

WAIT_S = 60
NAME = f"{TEACHER.name} {TEACHER.version}"


class Service:
    """An agent's process, its configuration, and the manager that started it."""

    def __init__(self, folder: Path, broker: str, **more: str) -> None:
        self.folder = folder
        self.broker = broker
        (folder / "teacher.fedsa").write_bytes(teacher_bundle())
        save_public(folder / "owner.pub", OWNER)
        save_public(folder / "coordinator.pub", COORDINATOR)
        self.configure()
        self.manager = Manager(str(folder / "notify"))
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            command("run", "--config", str(folder / "agent.toml")),
            env={
                **environment(),
                "NOTIFY_SOCKET": self.manager.address,
                "WATCHDOG_USEC": "600000",
                **more,
            },
            stderr=self._log,
        )

    def configure(self, text: str = "", limits: str = "") -> None:
        (self.folder / "agent.toml").write_text(
            f'device = "d1"\nbroker = "{self.broker}"\nbundle = "teacher.fedsa"\n'
            'owner_keys = ["owner.pub"]\ncoordinator_keys = ["coordinator.pub"]\nstate = "state"\n'
            f'log = "json"\ntelemetry_s = 0.2\n{text}\n[limits]\n{limits}\n'
        )

    def lines(self) -> list[dict[str, str]]:
        """Every line of the log is an object, or this fails."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]

    def said(self) -> str:
        return "\n".join(f"{line['level']}: {line['message']}" for line in self.lines())

    def reload(self) -> list[dict[str, str]]:
        """What systemd hears from the signal to the end of the reload."""
        self.manager.pending()
        self.process.send_signal(signal.SIGHUP)
        heard = self.manager.hear_until("READY", "1")
        return [told for told in heard if "WATCHDOG" not in told]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.manager.close()
        self._log.close()


@pytest.fixture
def service(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Service]:
    (tmp_path / "service").mkdir()
    service = Service(tmp_path / "service", str(mosquitto.address))
    yield service
    service.close()


@pytest.fixture
def caller(mosquitto: Mosquitto) -> Iterator[Caller]:
    transport = PahoTransport(mosquitto.address, "ada")
    caller = Caller(transport, "ada", retry_s=0.5)
    yield caller
    caller.close()
    transport.close()


def describe(caller: Caller) -> Card:
    return caller.call("d1", "describe", Empty(), answer=Card, timeout_s=30)[0]


def test_it_is_ready_without_a_broker_and_serves_when_there_is_one(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    (tmp_path / "service").mkdir()
    service = Service(tmp_path / "service", str(broker.address))
    try:
        heard = service.manager.hear_until("STATUS", "Connection refused")
        (ready,) = [told for told in heard if told.get("READY") == "1"]
        assert ready["STATUS"].startswith(f"{NAME} is loaded; waits for {broker.address}: ")
        service.manager.hear_until("WATCHDOG", "1")
        broker.start()
        service.manager.hear_until("STATUS", f"serves {NAME} at {broker.address}")
        # The broker goes again: it lives on, and says so.
        broker.kill()
        lost = service.manager.hear_until("STATUS", "waits for")[-1]["STATUS"]
        assert str(broker.address) in lost
        assert service.manager.hear_until("WATCHDOG", "1")
        broker.start()
        service.manager.hear_until("STATUS", f"serves {NAME}")
        service.process.send_signal(signal.SIGTERM)
        assert service.manager.hear_until("STOPPING", "1")
        assert service.process.wait(WAIT_S) == 0
        # A reason is said once, not at each of many tries.
        assert service.said().count("no broker answers") == 1
        assert service.lines()[-1]["message"] == "d1 has stopped"
    finally:
        service.close()
        broker.kill()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_name_that_cannot_be_looked_up_is_no_reason_to_end(host: str, tmp_path: Path) -> None:
    service = Service(tmp_path, f"mqtt://{host}:{free_port()}")
    try:
        heard = service.manager.hear_until("STATUS", "no broker answers")
        assert f"waits for mqtt://{host}" in heard[-1]["STATUS"]
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(WAIT_S) == 0
    finally:
        service.close()


class TestReload:
    def test_coordinators_limits_level_and_period_change_while_it_serves(
        self, service: Service, caller: Caller
    ) -> None:
        service.manager.hear_until("STATUS", "serves")
        session = describe(caller)
        assert session.limits.max_queued_requests == 64
        service.configure('allow = ["bob"]\nlog_level = "debug"', "max_queued_requests = 7")
        heard = service.reload()
        assert heard[0]["RELOADING"] == "1"
        assert int(heard[0]["MONOTONIC_USEC"]) > 0
        with pytest.raises(NotAllowed, match="ada is not among the coordinators"):
            describe(caller)
        service.configure('allow = ["ada"]', "max_queued_requests = 7")
        service.reload()
        assert describe(caller).limits.max_queued_requests == 7
        assert "info: taken: allow, limits, log_level" in service.said()
        assert service.process.poll() is None

    def test_what_cannot_change_is_said_and_stays(self, service: Service, caller: Caller) -> None:
        service.manager.hear_until("STATUS", "serves")
        service.configure("threads = 2\nmetrics_port = 9999\nallow = ['ada']")
        service.reload()
        assert "warning: restart this agent to take metrics_port, threads too" in service.said()
        assert "info: taken: allow" in service.said()
        assert describe(caller).runtime.threads == 1

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("allow = [", "is no TOML"),
            ("alow = []", "has the key 'alow', which is none"),
            ("[limits]\nmax_queued_requests = 0", "is no TOML"),  # a second table of that name
        ],
    )
    def test_a_bad_file_changes_nothing_and_says_why(
        self, text: str, sentence: str, service: Service, caller: Caller
    ) -> None:
        service.manager.hear_until("STATUS", "serves")
        service.configure(text)
        service.reload()
        assert "error: the configuration stays as it was" in service.said()
        assert sentence in service.said()
        assert describe(caller).teacher == TEACHER

    def test_a_key_s_file_is_read_again(self, service: Service, caller: Caller) -> None:
        service.manager.hear_until("STATUS", "serves")
        (service.folder / "coordinator.pub").write_bytes(b"garbage")
        service.reload()
        assert "stays as it was" in service.said()
        assert "coordinator.pub is no readable public key" in service.said()
        save_public(service.folder / "coordinator.pub", Ed25519PrivateKey.generate())
        service.reload()
        assert "taken: nothing is new but what files hold" in service.said()


def test_metrics_are_served_and_parse(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    port = free_port()
    service = Service(folder, str(mosquitto.address))
    service.process.kill()
    service.process.wait()
    service.configure(f"metrics_port = {port}")
    again = subprocess.Popen(
        command("run", "--config", str(folder / "agent.toml")),
        env={**environment(), "NOTIFY_SOCKET": service.manager.address},
        stderr=subprocess.DEVNULL,
    )
    try:
        service.manager.hear_until("STATUS", "serves")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = {s.name: s for f in text_string_to_metric_families(text) for s in f.samples}
        assert found["fedsa_connected"].value == 1
        assert found["fedsa_resident_memory_bytes"].value > 10 << 20
        assert found["fedsa_answered_total"].labels["device"] == "d1"
    finally:
        again.kill()
        again.wait()
        service.close()


def test_telemetry_tells_answer_times_and_what_is_missing(
    service: Service, caller: Caller, mosquitto: Mosquitto
) -> None:
    service.manager.hear_until("STATUS", "serves")
    listener = PahoTransport(mosquitto.address, "listener")
    inbox = Inbox(listener, topics.telemetry("d1"))
    describe(caller)
    count = len(inbox.messages)
    told, _ = frame.decode(inbox.wait(count + 2)[-1].payload, Telemetry)
    listener.close()
    times = told.answer_times["describe"]
    assert times.count >= 1
    assert times.p50_ms is not None
    assert 0 < times.p50_ms <= (times.p99_ms or 0)
    assert told.runtime is not None
    # What this machine does not have is named, whatever it is; what it has is not.
    for name in ("gpu_load", "power_w", "temperatures_c", "throttled"):
        value = getattr(told, name)
        assert (name in told.unavailable) == (value is None or value == {})


def test_a_start_that_fails_is_json_too(tmp_path: Path) -> None:
    service = Service(tmp_path, "mqtt://127.0.0.1:1")
    service.process.kill()
    service.process.wait()
    (tmp_path / "teacher.fedsa").write_bytes(b"garbage")
    done = subprocess.run(
        command("run", "--config", str(tmp_path / "agent.toml")),
        env={**environment(), "NOTIFY_SOCKET": service.manager.address},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "damaged or no bundle" in json.loads(line)["message"]
    assert "damaged or no bundle" in service.manager.hear_until("STOPPING", "1")[-1]["STATUS"]
    service.close()


def test_a_reload_that_fails_in_a_way_nobody_thought_of_leaves_the_agent_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "teacher.fedsa").write_bytes(teacher_bundle())
    save_public(tmp_path / "owner.pub", OWNER)
    configuration = tmp_path / "agent.toml"
    configuration.write_text(
        'device = "d1"\nbroker = "mqtt://127.0.0.1:1"\nbundle = "teacher.fedsa"\n'
        'owner_keys = ["owner.pub"]\nstate = "state"\nallow = ["ada"]\n'
    )
    manager = Manager(str(tmp_path / "notify"))
    notify = notifier({"NOTIFY_SOCKET": manager.address})
    read = source(File(), configuration, {})
    daemon = Daemon(read, read.read(), notify)

    def fail(_self: Connecting) -> None:
        raise RuntimeError("the moon is full")

    monkeypatch.setattr(Connecting, "renew_certificates", fail)
    configuration.write_text(configuration.read_text().replace("ada", "bob"))
    daemon._reload()
    assert "RELOADING" in manager.hear()
    assert manager.hear()["READY"] == "1"
    assert "the agent goes on as it was" in caplog.text
    assert "the moon is full" in caplog.text
    assert daemon._settings.allow == {"ada"}
    assert daemon._agent.config.allowed == {"ada"}
    daemon._agent.stop()
    notify.close()
    manager.close()


def test_a_new_certificate_is_shown_after_a_reload(tmp_path: Path) -> None:
    """As an enrolment that is renewed, through systemd's credential directory."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "another authority")
    certificate, key = authority.issue("broker")
    broker = Mosquitto(
        tmp_path,
        *(f"cafile {authority.certificate}", f"certfile {certificate}", f"keyfile {key}"),
        *("require_certificate true", "use_identity_as_username true"),
    ).start()
    folder = tmp_path / "service"
    credentials = tmp_path / "credentials"
    for made in (folder, credentials):
        made.mkdir()

    def enrol(by: Authority) -> None:
        issued = by.issue("d1")
        for path, name in zip(issued, ("device.crt", "device.key"), strict=True):
            (credentials / name).write_bytes(path.read_bytes())

    (credentials / "ca.crt").write_bytes(authority.certificate.read_bytes())
    enrol(other)
    service = Service(
        folder, f"mqtts://127.0.0.1:{broker.port}", CREDENTIALS_DIRECTORY=str(credentials)
    )
    try:
        # The broker does not take this one; the device goes on trying, and says why.
        service.manager.hear_until("STATUS", "did not accept 'd1'")
        # Read anew at the next try: nobody need reload before the first connection.
        enrol(authority)
        service.manager.hear_until("STATUS", "serves")
        enrol(other)
        service.reload()
        broker.kill()
        service.manager.hear_until("STATUS", "waits for")
        broker.start()
        # The new certificate is the one it shows.
        service.manager.hear_until("STATUS", "hangs up before it has accepted this client")
        enrol(authority)
        service.reload()
        service.manager.hear_until("STATUS", "serves")
    finally:
        service.close()
        broker.kill()


def test_it_survives_signals_while_it_waits_for_a_broker_that_takes_its_time(
    tmp_path: Path,
) -> None:
    """A port that accepts and says nothing: the slowest way not to be a broker."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        service = Service(tmp_path, f"mqtt://127.0.0.1:{silent.getsockname()[1]}")
        try:
            service.manager.hear_until("READY", "1")
            service.reload()
            os.kill(service.process.pid, signal.SIGTERM)
            assert service.process.wait(WAIT_S) == 0
        finally:
            service.close()
