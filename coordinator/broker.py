"""A broker for one run on this machine: mosquitto if it is installed, else the one in the iotcore wheel.

Both listen on loopback only.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coordinator import processes
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.limits import MAX_PACKET_BYTES
from edge_teacher.rpc.address import BrokerAddress

Kind = Literal["mosquitto", "iotcore"]

_MOSQUITTO = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
max_packet_size {packet}
max_queued_messages 10000
log_dest stderr
"""

_IOTCORE = """\
id = 0
[router]
id = 0
max_connections = 128
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 4
[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {packet}
max_inflight_count = 100
dynamic_filters = true
"""


@dataclass(frozen=True)
class LocalBroker:
    address: BrokerAddress
    name: str
    """With its version, as it stands in the report."""


def available() -> Kind:
    """mosquitto where it is on PATH (Debian keeps it in sbin), else iotcore."""
    return "mosquitto" if _mosquitto() else "iotcore"


@contextmanager
def local_broker(
    folder: Path, *, kind: Kind | None = None, port: int | None = None
) -> Iterator[LocalBroker]:
    """Start a broker, wait until it answers, end it afterwards. Its log is in `folder`.

    Raises UsageError for a port in use, CheckFailed if the broker does not come up.
    """
    kind = kind or available()
    chosen = _free_port() if port is None else port
    if port is not None and _answers(port):
        raise UsageError(f"port {port} is in use: choose another, or none to have one chosen")
    folder.mkdir(parents=True, exist_ok=True)
    values = {"port": chosen, "packet": MAX_PACKET_BYTES + 65536}
    if kind == "mosquitto":
        binary = _mosquitto()
        if binary is None:
            raise UsageError("mosquitto is not on PATH: install it, or take the embedded iotcore")
        config = folder / "mosquitto.conf"
        config.write_text(_MOSQUITTO.format(**values))
        command = [binary, "-c", str(config)]
        name = _mosquitto_version(binary)
    else:
        config = folder / "iotcore.toml"
        config.write_text(_IOTCORE.format(**values))
        code = (
            "import sys; from iotcore.iotcore import IotCoreBroker; "
            "IotCoreBroker(config_path=sys.argv[1]).run_forever()"
        )
        command = [sys.executable, "-c", code, str(config)]
        name = f"iotcore {importlib.metadata.version('iotcore')} (embedded)"
    log = folder / "broker.log"
    process = processes.start(command, log)
    try:
        _wait_until_up(process, chosen, name, log)
        yield LocalBroker(BrokerAddress(host="127.0.0.1", port=chosen), name)
    finally:
        processes.stop([process])


def _wait_until_up(
    process: subprocess.Popen[bytes], port: int, name: str, log: Path, deadline_s: float = 15
) -> None:
    end = time.monotonic() + deadline_s
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > end:
            raise CheckFailed(
                f"{name} did not come up on port {port}: {processes.last_words(log) or 'no output'}"
            )
        time.sleep(0.05)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin")


def _mosquitto_version(binary: str) -> str:
    words = subprocess.run([binary, "-h"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", words)
    return f"mosquitto {found[1]}" if found else "mosquitto"
