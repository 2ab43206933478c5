"""The transport against gRPC and a two-hop TCP relay, in one run: python -m benchmarks.transport

Medians of interleaved rounds, so that whatever else the machine does hits everybody. The last line is one
JSON object; a rate ratio above 1 means faster than the peer. `*_peak_over_bytes` is by how much the peak
of the resident memory grew for one answer of 64 MiB, over its size; 1.3 B + 16 MB is 1.54 there.
Needs mosquitto, and `pip install .[benchmarks]`; the 10 Mbit/s link needs root, ip and tc.
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc

from benchmarks.transport_link import control_over_slow_link
from benchmarks.transport_peers import (
    DEVICE,
    GRPC_METHOD,
    Give,
    Given,
    memory_bytes,
    reset_peak,
    running,
)
from coordinator.broker import local_broker
from edge_teacher.contract.limits import MIB
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair

Ask = Callable[[int], None]
"""Asks for an answer of so many bytes, and has it."""

MEMORY_BYTES = 64 * MIB


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def over_mqtt(caller: Caller) -> Ask:
    request = "x" * 1000

    def ask(count: int) -> None:
        body = Give(count=count, pad=request)
        _, tensors = caller.call(DEVICE, "give", body, answer=Given, timeout_s=120)
        if tensors["data"].nbytes != count:
            raise RuntimeError("the answer is not whole")

    return ask


def over_grpc(port: int) -> Ask:
    channel = grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)]
    )
    call = channel.unary_unary(GRPC_METHOD)

    def ask(count: int) -> None:
        if len(call(struct.pack("<Q", count) + bytes(1016))) != count:
            raise RuntimeError("the answer is not whole")

    return ask


def over_relay(port: int) -> Ask:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(count: int) -> None:
        connection.sendall(struct.pack("<Q", count))
        view = memoryview(bytearray(count))
        got = 0
        while got < count:
            got += connection.recv_into(view[got:])

    return ask


def seconds(ask: Ask, count: int, times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        ask(count)
    return (time.perf_counter() - began) / times


def interleaved(asks: dict[str, Ask], count: int, rounds: int, times: int = 1) -> dict[str, float]:
    """The median seconds of one answer, by peer."""
    for ask in asks.values():
        ask(count)
    found: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(rounds):
        for name, ask in asks.items():
            found[name].append(seconds(ask, count, times))
    return {name: statistics.median(values) for name, values in found.items()}


def control_p99_ms(ask: Ask, samples: int) -> float:
    """Of 1 kB round trips while 32 MB answers follow one another."""
    stop = threading.Event()

    def transfer() -> None:
        while not stop.is_set():
            ask(32 * MIB)

    transferring = threading.Thread(target=transfer)
    transferring.start()
    try:
        taken = sorted(seconds(ask, 1024) * 1e3 for _ in range(samples))
    finally:
        stop.set()
        transferring.join()
    return taken[int(len(taken) * 0.99)]


def peaks(caller: Caller) -> tuple[float, float]:
    """(receiver's, sender's) growth of peak memory for one answer, over its bytes."""
    before = caller.call(DEVICE, "give", Give(count=1, reset_peak=True, tell=True), answer=Given)[0]
    reset_peak()
    base = memory_bytes("VmRSS")
    answer = caller.call(DEVICE, "give", Give(count=MEMORY_BYTES, fresh=True), answer=Given)
    receiver = memory_bytes("VmHWM") - base
    del answer
    after = caller.call(DEVICE, "give", Give(count=1, tell=True), answer=Given)[0]
    return receiver / MEMORY_BYTES, (after.peak_bytes - before.rss_bytes) / MEMORY_BYTES


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--no-slow-link", action="store_true")
    chosen = options.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(local_broker(folder))
        ports = [free_port() for _ in range(3)]
        stack.enter_context(running("device", str(broker.address)))
        stack.enter_context(running("grpc", str(ports[0])))
        stack.enter_context(running("tcp", str(ports[1])))
        stack.enter_context(running("relay", str(ports[2]), str(ports[1])))
        pair = connect_pair(broker.address, f"ada-{secrets.token_hex(4)}")
        stack.callback(pair.close)
        caller = Caller(pair.control, "ada", bulk=pair.bulk)
        stack.callback(caller.close)
        receiver, sender = peaks(caller)
        asks = {
            "mqtt": over_mqtt(caller),
            "grpc": over_grpc(ports[0]),
            "relay": over_relay(ports[2]),
        }
        print(f"broker: {broker.name}; grpcio {grpc.__version__}; {chosen.rounds} rounds")
        taken = {}
        for name, count, times in (
            ("1 kB", 1024, 100),
            ("8 MB", 8 * MIB, 1),
            ("32 MB", 32 * MIB, 1),
        ):
            taken[name] = interleaved(asks, count, chosen.rounds, times)
            for peer, s in taken[name].items():
                print(f"{name:>6} {peer:>6}: {s * 1e3:8.2f} ms {count / s / 1e6:8.1f} MB/s")
        loopback = control_p99_ms(asks["mqtt"], 300)
    slow = None if chosen.no_slow_link else control_over_slow_link()
    result = {
        "rtt_1kB_vs_grpc": taken["1 kB"]["grpc"] / taken["1 kB"]["mqtt"],
        "answer_8MB_vs_relay": taken["8 MB"]["relay"] / taken["8 MB"]["mqtt"],
        "answer_32MB_vs_relay": taken["32 MB"]["relay"] / taken["32 MB"]["mqtt"],
        "answer_8MB_vs_grpc": taken["8 MB"]["grpc"] / taken["8 MB"]["mqtt"],
        "answer_32MB_vs_grpc": taken["32 MB"]["grpc"] / taken["32 MB"]["mqtt"],
        "control_p99_ms_loopback": loopback,
        "control_p99_ms_10mbit": slow,
        "receiver_peak_over_bytes": receiver,
        "sender_peak_over_bytes": sender,
    }
    sys.stdout.write(
        json.dumps({k: None if v is None else round(v, 3) for k, v in result.items()}) + "\n"
    )


if __name__ == "__main__":
    main()
