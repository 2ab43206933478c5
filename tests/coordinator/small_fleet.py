"""Two real agents, small data and quick settings, for commands that are run as processes of their own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator import processes
from coordinator.connection import connect
from edge_teacher.contract import frame, topics
from edge_teacher.contract.messages import FeaturesQuery, SaliencyQuery
from edge_teacher.keys import private_key_at
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message
from tests.coordinator.local_teacher import coloured_images
from tests.edge_teacher.nets import OWNER, TEACHER, teacher_bundle

DEVICES = ("left", "right")

QUICK = [
    *("--threads", "1", "--selection.k", "2", "--student.channels", "8", "--head.folds", "2"),
    *("--warmup.epochs", "6", "--scratch.epochs", "20", "--finetune.epochs", "10"),
    *("--aggregation.rounds", "4", "--aggregation.epochs", "3", "--selection.every_rounds", "2"),
]

Question = tuple[str, str, str, str, bool]


@dataclass
class Asked:
    """Every question that was on its way to a device, heard at the broker."""

    questions: Counter[Question] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, message: Message) -> None:
        topic = topics.parse(message.topic)
        if topic is None or topic.rest not in ("saliency", "features"):
            return
        with self.lock:
            if topic.rest == "saliency":
                saliency, _ = frame.decode(message.payload, SaliencyQuery)
                self.questions[(topic.owner, topic.rest, saliency.block, "", False)] += 1
            else:
                query, _ = frame.decode(message.payload, FeaturesQuery)
                self.questions[
                    (topic.owner, topic.rest, query.block, query.form, query.mirrored)
                ] += 1

    def take(self) -> Counter[Question]:
        """What was asked since it was taken last."""
        with self.lock:
            taken, self.questions = self.questions, Counter()
            return taken


@dataclass(frozen=True)
class SmallFleet:
    folder: Path
    address: BrokerAddress
    asked: Asked
    agents: list[subprocess.Popen[bytes]]

    def train(self, runs: Path, *more: str) -> list[str]:
        """The arguments of `fedsa` for a quick run there."""
        return [
            *("train", "--broker", str(self.address), "--task", "tints", "--runs", str(runs)),
            *("--signing-key", str(self.folder / "coordinator.key")),
            *(f"--data.{name}={self.folder / name}.npz" for name in ("probe", "transfer", "test")),
            *("--device", "left", "--device", "right"),
            *QUICK,
            *more,
        ]


@contextmanager
def small_fleet(folder: Path, address: BrokerAddress, transfer: int = 1200) -> Iterator[SmallFleet]:
    for seed, (name, count) in enumerate((("probe", 150), ("transfer", transfer), ("test", 60))):
        images, labels = coloured_images(count, 3, seed=seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    for device in DEVICES:
        # Of its own each: what is known of one teacher is known of every copy of it.
        info = msgspec.structs.replace(TEACHER, name=f"the {device} one")
        (folder / f"{device}.fedsa").write_bytes(teacher_bundle(info))
    public = OWNER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "owner.pub").write_bytes(public)
    private_key_at(folder / "coordinator.key")
    asked = Asked()
    listener = PahoTransport(address, "listener")
    listener.subscribe("fedsa/v1/+/req/#", asked.hear)
    listener.wait_connected(10)
    agents = [
        processes.start(
            [
                *(sys.executable, "-m", "edge_teacher", "run", "--device", device),
                *("--broker", str(address), "--bundle", str(folder / f"{device}.fedsa")),
                *("--owner-key", str(folder / "owner.pub"), "--state", str(folder / device)),
                *("--coordinator-key", str(folder / "coordinator.pub")),
            ],
            folder / f"{device}.log",
        )
        for device in DEVICES
    ]
    try:
        with connect(address, name="waiting") as connection:
            connection.fleet.wait(names=DEVICES, timeout_s=60)
        yield SmallFleet(folder, address, asked, agents)
    finally:
        processes.stop(agents)
        listener.close()
