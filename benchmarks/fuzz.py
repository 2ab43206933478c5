"""Hostile messages at both ends: python -m benchmarks.fuzz [--messages 100000] [--atheris 100000]

Throws damaged, lying and misplaced messages at a server and a client, half at each, and reports what they
cost; ends with an error if an end stops working or its memory grows. With `--atheris N`, N inputs found by
coverage (`pip install atheris`) go through the frame decoder and the reassembly of chunks.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time

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

    def one(data: bytes) -> None:
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
