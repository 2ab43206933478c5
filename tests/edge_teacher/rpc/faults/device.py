"""A device of its own process: python -m tests.edge_teacher.rpc.faults.device PORT LOG [OPTION=VALUE…]

It notes every execution in LOG, so that a test can count them whatever dies. `chaos=SEED` damages the chunks
it sends; `skew=SECONDS` sets its clock wrong; `limits=JSON` are its limits; `slow=SECONDS` a question takes.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from edge_teacher.contract.limits import Limits
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.pair import connect_pair
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from edge_teacher.rpc.transport import Message, Transport
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Said, noise


class Chaos:
    """Stands before a transport: a third of the chunks are lost, doubled, held back, cut short or flipped."""

    def __init__(self, inner: Transport, seed: int) -> None:
        self._inner = inner
        self._chance = random.Random(seed)
        self._held: list[Message] = []
        self.subscribe, self.unsubscribe = inner.subscribe, inner.unsubscribe
        self.on_connect = inner.on_connect
        self.on_room, self.close = inner.on_room, inner.close

    @property
    def connected(self) -> bool:
        return self._inner.connected

    @property
    def room(self) -> bool:
        return self._inner.room

    def publish(self, message: Message) -> None:
        for sent in self._spoil(message):
            self._inner.publish(sent)

    def _spoil(self, message: Message) -> list[Message]:
        held, self._held = self._held, []
        payload = bytes(message.payload)
        kind = self._chance.randrange(15)
        if kind == 0:
            return held
        if kind == 1:
            return [message, message, *held]
        if kind == 2:
            self._held = [message]  # it comes after the next one
            return held
        if kind == 3:
            return [
                replace(message, payload=payload[: self._chance.randrange(len(payload))]),
                *held,
            ]
        if kind == 4:
            spoilt = bytearray(payload)
            spoilt[self._chance.randrange(len(spoilt))] ^= 1 << self._chance.randrange(8)
            return [replace(message, payload=bytes(spoilt)), *held]
        return [message, *held]


def main() -> None:
    port, log = int(sys.argv[1]), Path(sys.argv[2])
    options = dict(argument.split("=", 1) for argument in sys.argv[3:])
    if "skew" in options:
        skew, true = float(options["skew"]), time.time
        time.time = lambda: true() + skew
    noting = threading.Lock()

    def answer(ask: Ask, _tensors: Tensors) -> Answer:
        with noting, log.open("a") as file:
            file.write(f"{os.getpid()} {ask.text}\n")
        if "slow" in options:
            threading.Event().wait(float(options["slow"]))
        tensors = {"noise": noise(ask.bytes_back)} if ask.bytes_back else {}
        return Said(text=ask.text, times=1), tensors

    pair = connect_pair(BrokerAddress(host="127.0.0.1", port=port), DEVICE)
    bulk: Transport = pair.bulk
    if "chaos" in options:
        bulk = Chaos(bulk, int(options["chaos"]))
    limits = msgspec.json.decode(options.get("limits", "{}"), type=Limits)
    server = Server(
        pair.control, DEVICE, {"echo": Method(Ask, answer)}, limits=limits, workers=2, bulk=bulk
    )
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.drain()
    pair.close()


if __name__ == "__main__":
    main()
