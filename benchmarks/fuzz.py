"""Hostile messages at both ends: python -m benchmarks.fuzz [--messages 100000] [--atheris 100000]

Throws damaged, lying and misplaced messages at a server and a client, half at each, and reports what they
cost; ends with an error if an end stops working or its memory grows. With `--atheris N`, N inputs found by
coverage (`pip install atheris`) go through the reading of a PUBLISH, the frame decoder, the reassembly of
chunks, and everything a server and a client do with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import struct
import sys
import time
from typing import Any

GROWTH_BYTES = 32 << 20


def throw(messages: int, seed: int) -> None:
    from benchmarks.transport_peers import memory_bytes
    from tests.edge_teacher.rpc.hostile import Hostile, Target

    target, hostile = Target(), Hostile(random.Random(seed))
    for _ in range(5000):  # what is taken once and kept: caches, arenas
        target.attack(hostile)
    target.survived()
    base, began = memory_bytes("VmRSS"), time.perf_counter()
    for i in range(messages // 2):
        target.attack(hostile)
        if i % 200 == 0:
            target.survived()  # also so that the in-memory broker is not merely filled
    target.survived()
    grown, seconds = memory_bytes("VmRSS") - base, time.perf_counter() - began
    target.close()
    print(
        f"{messages} messages in {seconds:.1f} s; memory {grown / 1e6:+.1f} MB; both ends answer, "
        f"{target.server.counters.refused} refused, no unknown error"
    )
    if grown > GROWTH_BYTES:
        raise SystemExit(f"memory grew by {grown} bytes, and may by {GROWTH_BYTES}")


def guided(runs: int) -> None:
    """Coverage is counted in what is imported here first: so nothing of it is imported above."""
    import atheris

    with atheris.instrument_imports(include=["edge_teacher.contract", "edge_teacher.rpc"]):
        from edge_teacher.contract import frame
        from edge_teacher.contract.errors import RpcError
        from edge_teacher.contract.messages import Chunk, Control, FeaturesQuery, Problem
        from edge_teacher.rpc.chunks import Reassembly
        from edge_teacher.rpc.paho_client import read_publish
        from tests.edge_teacher.rpc.hostile import Target

    target, count = Target(), 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        if count % 10_000 == 0:
            target.survived()
        to_server, message = _message(atheris.FuzzedDataProvider(data), target)
        target.hand(message, to_server=to_server)
        with contextlib.suppress(ValueError, struct.error, IndexError):
            read_publish(0x32, memoryview(data))
        for raw in (data, b"FSA1" + data):
            for kind in (FeaturesQuery, Problem, Control, Chunk):
                try:
                    message, tensors = frame.decode(raw, kind, most_unpacked_bytes=1 << 20)
                    if isinstance(message, Chunk):
                        Reassembly(message, 1 << 20).add(
                            message, frame.tensor(tensors, "data", "u8", None)
                        )
                except RpcError:
                    continue

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=512", "-verbosity=0"], one)
    atheris.Fuzz()


def _message(source: Any, target: Any) -> tuple[bool, Any]:
    """(whether it is for the server, a message of which chance decides all but the topic's beginning)."""
    from edge_teacher.rpc.transport import Message
    from tests.edge_teacher.rpc.hostile import COORDINATOR, DEVICE

    def any_of(*known: Any) -> Any:
        return source.PickValueInList(list(known))

    to_server = source.ConsumeBool()
    device = DEVICE if to_server else "silent"
    answer_to = f"fedsa/v1/{COORDINATOR}/rsp/{device}"
    if to_server:
        topic = f"fedsa/v1/{DEVICE}/" + any_of("ctl", "req/echo", "put/echo", "req/change", "req/x")
    else:
        topic = any_of(answer_to, f"fedsa/v1/{COORDINATOR}/data/{device}")
    user = {
        "v": any_of("", "1.0", "1.1", source.ConsumeUnicodeNoSurrogates(6)),
        "status": any_of("200", "206", "429", source.ConsumeUnicodeNoSurrogates(4)),
        "accept": any_of("", "zstd"),
        "ms": any_of("", "1", source.ConsumeUnicodeNoSurrogates(4)),
    }
    correlation = b"c" if to_server else target.open_question()
    correlation = any_of(correlation, source.ConsumeBytes(3))
    expiry_s = any_of(None, 0, 1, 60)
    framed, rest = source.ConsumeBool(), source.ConsumeBytes(1 << 16)
    # Chance alone seldom finds the length that the header has.
    payload = b"FSA1" + struct.pack("<I", len(rest)) + rest + bytes(64) if framed else rest
    return to_server, Message(
        topic=topic,
        payload=payload,
        response_topic=any_of(answer_to, "", "#"),
        correlation=correlation,
        expiry_s=expiry_s,
        user=user,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--messages", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--atheris", type=int, default=0, metavar="N")
    chosen = options.parse_args()
    logging.getLogger("edge_teacher").setLevel(logging.ERROR)
    if chosen.atheris:
        guided(chosen.atheris)
    else:
        throw(chosen.messages, chosen.seed)


if __name__ == "__main__":
    main()
