"""Control latency over a 10 Mbit/s link: two network namespaces, a veth pair, `tc … tbf` on both ends.

One namespace holds the broker and the coordinator, the other the device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transport_peers import DEVICE, Give, Given, running
from edge_teacher.contract.limits import MIB
from edge_teacher.rpc.address import parse_broker
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair

RATE = "10mbit"
QUEUE = "400ms"
"""What the link's own buffer holds: tc's documentation uses it, and home routers hold more."""

_PORT = 1883


def control_over_slow_link() -> float | None:
    """p99 in ms of 1 kB round trips during one answer of 32 MiB; None where it cannot be measured."""
    why = why_no_link()
    if why:
        print(f"10 Mbit/s link: not measured, {why}")
        return None
    with (
        tempfile.TemporaryDirectory() as folder,
        slow_links(Path(folder)) as link,
        running("device", link.urls[0], within=link.there[0]),
    ):
        command = [*link.here, sys.executable, "-m", "benchmarks.transport_link", link.urls[0]]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(output, end="")
    return float(output.split()[-1])


def why_no_link() -> str:
    """What is missing for `slow_links` here; empty if nothing is."""
    missing = [tool for tool in ("ip", "tc", "mosquitto") if not _find(tool)]
    if missing:
        return f"{', '.join(missing)} is missing"
    return "" if os.geteuid() == 0 else "only root makes namespaces"


@dataclass(frozen=True)
class Links:
    """Ends of links; a command is run through `here` at the near one, and through one of `there` at the far.

    `urls` are of the broker, which is here, as each of the far ends calls it.
    """

    here: tuple[str, ...]
    there: tuple[tuple[str, ...], ...]
    urls: tuple[str, ...]


@contextmanager
def slow_links(folder: Path, count: int = 1) -> Iterator[Links]:
    """Shaped links with a broker at the near end of all, whose settings are put into `folder`."""
    with _namespaces(count) as (here, there):
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {_PORT}\nallow_anonymous true\nset_tcp_nodelay true\nuser root\n"
        )
        binary = _find("mosquitto") or "mosquitto"
        broker = subprocess.Popen(
            [*_within(here), binary, "-c", str(config)], stderr=subprocess.DEVNULL
        )
        urls = tuple(f"mqtt://{_address(number)[0]}:{_PORT}" for number in range(count))
        try:
            time.sleep(1)
            yield Links(_within(here), tuple(map(_within, there)), urls)
        finally:
            broker.kill()
            broker.wait()


@contextmanager
def _namespaces(count: int) -> Iterator[tuple[str, list[str]]]:
    here = f"fedsa-a-{os.getpid()}"
    there = [f"fedsa-b{number}-{os.getpid()}" for number in range(count)]
    shape = ("tbf", "rate", RATE, "burst", "32kbit", "latency", QUEUE)
    try:
        for name in (here, *there):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for number, far in enumerate(there):
            ends = (f"fa{number}-{os.getpid()}", f"fb{number}-{os.getpid()}")
            _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip((here, far), ends, _address(number), strict=True):
                _run("ip", "link", "set", end, "netns", name)
                inside = ("ip", "-n", name)
                _run(*inside, "addr", "add", f"{address}/24", "dev", end)
                _run(*inside, "link", "set", end, "up")
                _run(*_within(name), "tc", "qdisc", "add", "dev", end, "root", *shape)
        yield here, there
    finally:
        for name in (here, *there):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _address(number: int) -> tuple[str, str]:
    """Of the near and of the far end of a link."""
    return f"10.253.{77 + number}.1", f"10.253.{77 + number}.2"


def _within(namespace: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace)


def _find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _measure(url: str) -> None:
    pair = connect_pair(parse_broker(url), "ada-link")
    caller = Caller(pair.control, "ada", bulk=pair.bulk)
    caller.call(DEVICE, "give", Give(count=1024), answer=Given)
    done = threading.Event()

    def transfer() -> None:
        caller.call(DEVICE, "give", Give(count=32 * MIB), answer=Given, timeout_s=300)
        done.set()

    began = time.perf_counter()
    threading.Thread(target=transfer).start()
    taken = []
    while not done.is_set():
        asked = time.perf_counter()
        caller.call(DEVICE, "give", Give(count=1024), answer=Given, timeout_s=60)
        taken.append((time.perf_counter() - asked) * 1e3)
    seconds = time.perf_counter() - began
    taken.sort()
    print(
        f"10 Mbit/s link: 32 MiB in {seconds:.1f} s; {len(taken)} control round trips, "
        f"median {taken[len(taken) // 2]:.1f} ms, p99 {taken[int(len(taken) * 0.99)]:.1f}"
    )
    caller.close()
    pair.close()


if __name__ == "__main__":
    _measure(sys.argv[1])
