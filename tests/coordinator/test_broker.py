"""Both brokers of a run: they answer, on loopback only, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from coordinator import broker as brokers
from coordinator.broker import Kind, local_broker
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.limits import CHUNK_BYTES, Limits
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.pair import connect_pair
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message
from tests.coordinator.test_processes import alive, wait_until
from tests.edge_teacher.rpc.test_paho import Inbox
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Device, Said, noise


@pytest.fixture(params=get_args(Kind))
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    if found == "mosquitto" and brokers._mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    if found == "iotcore" and importlib.util.find_spec("iotcore") is None:
        pytest.skip("iotcore is not installed")
    return found


def listening(port: int) -> set[str]:
    """The local addresses, as the kernel writes them, that accept connections at `port`."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, in_use = local.split(":")
            if int(in_use, 16) == port and state == "0A":
                found.add(address)
    return found


def children() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and alive(int(folder.name)):
            found.add(int(folder.name))
    return found


def test_it_carries_questions_and_chunked_answers_and_births(kind: Kind, tmp_path: Path) -> None:
    with local_broker(tmp_path, kind=kind) as broker:
        assert kind in broker.name
        will = Message(topic="fedsa/v1/d1/state", payload=b"gone", retain=True)
        a = PahoTransport(broker.address, DEVICE, will=will)
        b = PahoTransport(broker.address, "ada")
        device = Device()
        server = Server(a, DEVICE, device.methods(), limits=Limits())
        server.start()
        a.publish(Message(topic="fedsa/v1/d1/state", payload=b"born", retain=True))
        caller = Caller(b, "ada", retry_s=1)
        count = 5 * CHUNK_BYTES + 3
        _, tensors = caller.call(DEVICE, "echo", Ask(bytes_back=count), answer=Said, timeout_s=60)
        assert np.array_equal(tensors["noise"], noise(count))
        late = Inbox(b, "fedsa/v1/+/state")
        assert late.wait(1)[0].payload == b"born"
        a._client.socket().close()  # type: ignore[union-attr]  # as when the process dies
        assert late.wait(2)[1].payload == b"gone"
        caller.close()
        server.drain()
        a.close()
        b.close()


def test_it_carries_control_and_data_apart(kind: Kind, tmp_path: Path) -> None:
    with local_broker(tmp_path, kind=kind) as broker:
        theirs, ours = (connect_pair(broker.address, name) for name in (DEVICE, "ada"))
        assert theirs.bulk is not theirs.control
        device = Device()
        server = Server(theirs.control, DEVICE, device.methods(), limits=Limits(), bulk=theirs.bulk)
        server.start()
        caller = Caller(ours.control, "ada", bulk=ours.bulk, retry_s=1)
        count = 5 * CHUNK_BYTES + 3
        for _ in range(2):
            sent = {"up": noise(400_000)}
            _, tensors = caller.call(
                DEVICE, "echo", Ask(bytes_back=count), sent, answer=Said, timeout_s=60
            )
            assert np.array_equal(tensors["noise"], noise(count))
            assert np.array_equal(tensors["up"], sent["up"])
        assert len(device.executed) == 2
        caller.close()
        server.drain()
        theirs.close()
        ours.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_listens_on_loopback_only_and_is_gone_afterwards(kind: Kind, tmp_path: Path) -> None:
    before = children()
    with local_broker(tmp_path, kind=kind) as broker:
        assert listening(broker.address.port) == {"0100007F"}
        (process,) = children() - before
    assert not alive(process)
    assert listening(broker.address.port) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_is_gone_after_an_interruption_too(kind: Kind, tmp_path: Path) -> None:
    before = children()
    with pytest.raises(KeyboardInterrupt), local_broker(tmp_path, kind=kind):
        raise KeyboardInterrupt
    wait_until(lambda: children() <= before, "the broker's end")


def test_a_port_in_use_is_a_usage_error(kind: Kind, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(UsageError, match=f"port {port} is in use"),
            local_broker(tmp_path, kind=kind, port=port),
        ):
            pass
    with local_broker(tmp_path, kind=kind, port=port) as broker:
        assert broker.address.port == port


def test_two_at_once_do_not_meet(kind: Kind, tmp_path: Path) -> None:
    with (
        local_broker(tmp_path / "a", kind=kind) as a,
        local_broker(tmp_path / "b", kind=kind) as b,
    ):
        assert a.address.port != b.address.port


def test_one_that_does_not_come_up_says_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if brokers._mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    monkeypatch.setattr(brokers, "_MOSQUITTO", "listener {port} 127.0.0.1\nnonsense {packet}\n")
    with (
        pytest.raises(CheckFailed, match=r"did not come up on port \d+: .*nonsense"),
        local_broker(tmp_path, kind="mosquitto"),
    ):
        pass


class TestAvailable:
    def test_mosquitto_where_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        binary = tmp_path / "mosquitto"
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert brokers.available() == "mosquitto"

    def test_else_the_embedded_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(brokers.shutil, "which", lambda *_a, **_m: None)
        assert brokers.available() == "iotcore"
        with (
            pytest.raises(UsageError, match="not on PATH"),
            local_broker(tmp_path, kind="mosquitto"),
        ):
            pass
