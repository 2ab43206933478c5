"""What systemd hears, over a real datagram socket."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_teacher.agent.pulse import Pulse
from edge_teacher.agent.systemd import Notifier, forget, notifier
from edge_teacher.contract.errors import UsageError


class Manager:
    """The other end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(60)

    def hear(self) -> dict[str, str]:
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def hear_until(self, name: str, value: str) -> list[dict[str, str]]:
        """All that comes up to the message whose `name` contains `value`."""
        heard = [self.hear()]
        end = time.monotonic() + 60
        while value not in heard[-1].get(name, ""):
            assert time.monotonic() < end, heard
            heard.append(self.hear())
        return heard

    def pending(self) -> list[dict[str, str]]:
        self._socket.setblocking(False)
        heard = []
        try:
            while True:
                heard.append(self.hear())
        except BlockingIOError:
            self._socket.settimeout(60)
        return heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = str(tmp_path / "notify")
    manager = Manager(name if request.param == "path" else f"@fedsa-{os.getpid()}-{time.time_ns()}")
    yield manager
    manager.close()


def test_what_a_service_says_in_its_life(manager: Manager) -> None:
    notify = notifier({"NOTIFY_SOCKET": manager.address})
    assert notify.listening
    notify.ready("loaded;\nwaits for a broker")
    assert manager.hear() == {"READY": "1", "STATUS": "loaded; waits for a broker"}
    notify.status("serves")
    assert manager.hear() == {"STATUS": "serves"}
    notify.status("serves")  # the same again is nothing new
    notify.alive()
    assert manager.hear() == {"WATCHDOG": "1"}
    before = time.monotonic_ns() // 1000
    notify.reloading()
    told = manager.hear()
    assert told["RELOADING"] == "1"
    assert before <= int(told["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    notify.stopping("draining")
    assert manager.hear() == {"STOPPING": "1", "STATUS": "draining"}
    notify.close()
    notify.alive()  # nobody is told any more, and nothing fails
    assert manager.pending() == []


@pytest.mark.parametrize(
    ("environment", "period"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_s_period_is_for_the_process_it_names(
    environment: dict[str, str], period: float | None, tmp_path: Path
) -> None:
    assert notifier({"NOTIFY_SOCKET": str(tmp_path / "n"), **environment}).watchdog_s == period


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, "NOTIFY_SOCKET is 'vsock:2:1234'"),
        ({"WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC is 'soon'"),
        ({"WATCHDOG_USEC": "0"}, "WATCHDOG_USEC is '0'"),
    ],
)
def test_what_systemd_never_sets_is_said(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        notifier(environment)


def test_without_systemd_nothing_is_said_and_nothing_fails() -> None:
    notify = notifier({})
    assert not notify.listening
    notify.ready("here")
    notify.alive()


def test_a_manager_that_does_not_read_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notify = Notifier(manager.address)
    with caplog.at_level(logging.WARNING):
        for _ in range(2000):
            notify.alive()
    assert "systemd did not hear WATCHDOG" in caplog.text
    manager.close()
    notify.alive()  # and one that is gone neither


def test_children_do_not_inherit_the_way_to_it() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "HOME": "/"}
    forget(environment)
    assert environment == {"HOME": "/"}


class TestPulse:
    def test_the_watchdog_hears_nothing_while_something_is_stuck(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = Manager(str(tmp_path / "notify"))
        problem = ""
        pulse = Pulse(Notifier(manager.address, 30), lambda: problem, lambda: "serves")
        pulse.look()
        assert manager.pending() == [{"WATCHDOG": "1"}, {"STATUS": "serves"}]
        problem = "saliency has been computed for 700 s"
        for _ in range(3):
            pulse.look()
        assert manager.pending() == [{"STATUS": f"stuck: {problem}"}]
        assert caplog.text.count("no progress: saliency has") == 1
        assert "systemd will restart it" in caplog.text
        problem = ""
        pulse.look()
        assert manager.pending() == [{"WATCHDOG": "1"}, {"STATUS": "serves"}]
        manager.close()

    def test_it_beats_three_times_in_a_watchdog_s_period(self, tmp_path: Path) -> None:
        manager = Manager(str(tmp_path / "notify"))
        pulse = Pulse(Notifier(manager.address, 0.15), lambda: "", lambda: "serves")
        pulse.start()
        heard = [manager.hear() for _ in range(5)]
        pulse.stop()
        assert heard.count({"WATCHDOG": "1"}) == 4
        manager.close()
