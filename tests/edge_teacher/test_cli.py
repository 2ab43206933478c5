"""`edge-teacher` as a user meets it: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_teacher import cli
from edge_teacher.contract import frame
from edge_teacher.contract.messages import Card, Empty, State
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message
from tests.brokers import Mosquitto
from tests.edge_teacher.nets import COORDINATOR, OWNER, TEACHER, student, teacher_bundle

WAIT_S = 60


def save_public(path: Path, key: Ed25519PrivateKey) -> None:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(pem)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_public(tmp_path / "owner.pub", OWNER)
    save_public(tmp_path / "coordinator.pub", COORDINATOR)
    (tmp_path / "teacher.fedsa").write_bytes(teacher_bundle())
    (tmp_path / "student.fedsa").write_bytes(student(key=OWNER)[1])
    (tmp_path / "garbage").write_bytes(b"garbage")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = {
    "--device": "d1",
    "--broker": "mqtt://127.0.0.1:1",
    "--bundle": "teacher.fedsa",
    "--owner-key": "owner.pub",
    "--coordinator-key": "coordinator.pub",
    "--state": "state",
}


def run_with(**changes: str | None) -> list[str]:
    options = {**RUN, **{"--" + k.replace("_", "-"): v for k, v in changes.items()}}
    words = [(name, value) for name, value in options.items() if value is not None]
    return ["run", *(word for pair in words for word in pair)]


@pytest.fixture
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


BAD = [
    ([], 2, "required"),
    (["fly"], 2, "invalid choice"),
    (["run"], 2, "--device"),
    (run_with(device="a/b"), 2, "'a/b' is no usable id"),
    (run_with(allow="+"), 2, "'+' is no usable id"),
    (run_with(broker="localhost"), 2, "write mqtt://HOST:PORT"),
    (run_with(broker="mqtt://h", ca="ca.crt"), 2, "without TLS"),
    (run_with(broker="mqtts://127.0.0.1:1", ca="garbage"), 2, "TLS files garbage"),
    (run_with(threads="0"), 2, "'0' is no number of cores"),
    (run_with(threads="many"), 2, "'many' is no number of cores"),
    (run_with(owner_key=None), 2, "--owner-key"),
    (run_with(owner_key="nowhere.pub"), 2, "nowhere.pub is no readable public key"),
    (run_with(owner_key="garbage"), 2, "garbage is no readable public key"),
    (run_with(coordinator_key="garbage"), 2, "garbage is no readable public key"),
    (run_with(bundle="nowhere.fedsa"), 2, "nowhere.fedsa cannot be read"),
    (run_with(bundle="garbage"), 1, "garbage is damaged or no bundle"),
    (run_with(bundle="student.fedsa"), 1, "student.fedsa holds a student"),
    (run_with(owner_key="coordinator.pub"), 1, "not trusted here"),
    (run_with(state="garbage/state"), 2, "garbage/state cannot be used"),
    (run_with(log="xml"), 2, "invalid choice: 'xml'"),
    (run_with(metrics_port="0"), 2, "'0' is no port"),
    (run_with(config="nowhere.toml"), 2, "nowhere.toml cannot be read"),
    (run_with(config="garbage"), 2, "garbage is no TOML"),
    (["info", "teacher.fedsa"], 2, "--owner-key"),
    (["info", "nowhere", "--owner-key", "owner.pub"], 2, "nowhere cannot be read"),
    (["info", "garbage", "--owner-key", "owner.pub"], 1, "damaged or no bundle"),
    (["info", "teacher.fedsa", "--owner-key", "coordinator.pub"], 1, "not trusted here"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), BAD, ids=lambda a: str(a)[:60])
@pytest.mark.usefixtures("folder", "signals")
def test_bad_input_is_one_sentence_and_the_documented_code(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(arguments)
    except SystemExit as end:  # argparse ends so
        found = end.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert found == code
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert sentence in lines[-1]
    assert lines[-1].startswith("edge-teacher")
    usage = code == 2 and said.err.startswith("usage:")
    assert usage or len(lines) == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edge_teacher.cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(run_with(bundle="garbage"), 1), (run_with(bundle="nowhere"), 2), (["--version"], 0)],
)
def test_the_process_itself_ends_with_the_code_and_no_traceback(
    folder: Path, arguments: list[str], code: int
) -> None:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.usefixtures("folder")
def test_info_prints_the_card_of_a_verified_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "teacher.fedsa", "--owner-key", "owner.pub"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "teacher"
    assert found["card"]["teacher"]["name"] == TEACHER.name
    assert list(found["files"]) == ["teacher.onnx"]
    assert cli.main(["info", "student.fedsa", "--owner-key", "owner.pub"]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["task"] == "colours"


class TestRun:
    @pytest.fixture
    def process(self, folder: Path, mosquitto: Mosquitto) -> Iterator[subprocess.Popen[str]]:
        self.listener = PahoTransport(mosquitto.address, "listener")
        self.heard: list[State] = []
        self.changed = threading.Condition()
        self.listener.subscribe("fedsa/v1/d1/state", self._note)
        started = subprocess.Popen(
            command(*run_with(broker=str(mosquitto.address))),
            cwd=folder,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wait(1)
        yield started
        started.kill()
        started.communicate()
        self.listener.close()

    def _note(self, message: Message) -> None:
        with self.changed:
            self.heard.append(frame.decode(message.payload, State)[0])
            self.changed.notify_all()

    def wait(self, count: int) -> list[State]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.heard) >= count, WAIT_S)
            return list(self.heard)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_gives_a_clean_offline_state(
        self, process: subprocess.Popen[str], number: signal.Signals, mosquitto: Mosquitto
    ) -> None:
        process.send_signal(number)
        _, said = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        assert "Traceback" not in said
        assert said.strip().endswith("d1 has stopped")
        born, gone = self.wait(2)
        assert (born.online, gone.online) == (True, False)
        assert born.session == gone.session
        late = PahoTransport(mosquitto.address, "late")
        retained: list[Message] = []
        arrived = threading.Event()
        late.subscribe("fedsa/v1/d1/state", lambda m: (retained.append(m), arrived.set()))  # type: ignore[func-returns-value, arg-type, return-value]
        assert arrived.wait(WAIT_S)
        assert not frame.decode(retained[0].payload, State)[0].online
        late.close()

    def test_two_agents_do_not_share_a_state(
        self, process: subprocess.Popen[str], folder: Path
    ) -> None:
        assert isinstance(process.args, list)
        second = subprocess.run(
            process.args,
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert second.returncode == 2
        assert "another agent is at work in" in second.stderr
        assert "Traceback" not in second.stderr

    def test_killed_it_is_offline_by_its_will(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        assert [state.online for state in self.wait(2)] == [True, False]

    def test_it_answers_without_torch_and_comes_back_after_the_broker(
        self, process: subprocess.Popen[str], mosquitto: Mosquitto
    ) -> None:
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
        caller = Caller(self.listener, "ada", retry_s=0.5)
        assert caller.call("d1", "describe", Empty(), answer=Card)[0].teacher == TEACHER
        mosquitto.kill()
        mosquitto.start()
        # The broker has forgotten everything; the device says again that it is there.
        assert [state.online for state in self.wait(2)] == [True, True]
        assert caller.call("d1", "describe", Empty(), answer=Card)[0].teacher == TEACHER
        caller.close()

    def test_a_broker_that_is_gone_does_not_keep_it_from_ending(
        self, process: subprocess.Popen[str], mosquitto: Mosquitto
    ) -> None:
        mosquitto.kill()
        process.terminate()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said
