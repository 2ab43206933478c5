"""One training from the demo's teachers, in this process or on devices: what `benchmarks.remote` compares.

    python -m benchmarks.remote_run --teachers inside|BROKER_URL --seed N --cache FOLDER

Under torchrun it is one of several processes. Its last line of output is a JSON object. The clock runs from
the first stage to the trained student: loading programs and waiting for devices to start is in none of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.example_networks import ExampleNetwork, example_bundles
from coordinator.answers import RememberedAnswers
from coordinator.config import Config
from coordinator.connection import connect
from coordinator.data import read_configured
from coordinator.demo import EXAMPLES, with_demo_data
from coordinator.encodings import EncodingLedger
from coordinator.progress import Silent
from coordinator.ranks import joined
from coordinator.settings import load_config
from coordinator.shared_teachers import shared
from coordinator.teachers import RemoteTeacher, Teacher, as_sent
from coordinator.training import train
from edge_teacher.agent.pooling import attention_pool, mean_pool
from edge_teacher.rpc.address import parse_broker

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]

SETTINGS = "other settings of the training, the same for all cases"
_BATCH = 64
_ALL_THERE_S = 120.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one training came to. `accuracy` of the student on the demo's test images, in FP32."""

    accuracy: float
    seconds: float
    by_stage: dict[str, float]
    bytes_received: int = 0
    lost: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()


class Inside:
    """A bundle's network in this process: the graph that a device runs, and its answers' precision."""

    def __init__(self, path: Path) -> None:
        self._network = ExampleNetwork(path)
        self.name = self.identity = device_of(path)

    def saliency(self, images: Images) -> Floats:
        return self._run(images, lambda _features, saliency, _rows: saliency)

    def pooled(self, images: Images, *, mirrored: bool = False, tap: str | None = None) -> Floats:
        shown = np.ascontiguousarray(images[:, :, ::-1]) if mirrored else images
        return self._run(shown, lambda features, _saliency, _rows: mean_pool(features))

    def attended(self, images: Images, attention: Floats, *, tap: str | None = None) -> Floats:
        sent = as_sent(attention, len(images)).astype(np.float32)
        return self._run(
            images, lambda features, _saliency, rows: attention_pool(features, sent[rows])
        )

    def features(self, images: Images) -> Floats:
        return self._run(images, lambda features, _saliency, _rows: features)

    def _run(self, images: Images, reduce: object) -> Floats:
        assert callable(reduce)
        found = []
        for start in range(0, len(images), _BATCH):
            rows = slice(start, start + _BATCH)
            features, saliency = self._network.run(images[rows], "features.last", "saliency")
            found.append(reduce(features, saliency, rows))
        return np.concatenate(found).astype(np.float16).astype(np.float32)


class Ending(Silent):
    """Kills processes, without a warning, when a stage begins."""

    def __init__(self, stage: str, pids: list[int]) -> None:
        self._stage, self._pids = stage, pids

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        if stage == self._stage:
            while self._pids:
                os.kill(self._pids.pop(), signal.SIGKILL)


def device_of(bundle: Path) -> str:
    """As the demo calls the device that has this teacher."""
    return bundle.stem.replace("teacher", "device")


def settings(changed: Sequence[str]) -> Config:
    """The demo's, without the baseline: nothing here is compared to it. Raises UsageError."""
    pairs = dict(text.split("=", 1) for text in changed)
    given = {"threads": "1", "scratch.epochs": "0", **pairs}
    return with_demo_data(load_config(None, given, {}), EXAMPLES)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teachers", required=True, help='"inside", or the URL of their broker')
    parser.add_argument("--seed", default="0")
    parser.add_argument("--cache", type=Path, required=True, help="of answers; an empty folder")
    parser.add_argument("--kill", type=int, nargs="*", default=[], help="process ids, killed …")
    parser.add_argument("--at", default="", help="… when this stage begins")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=SETTINGS)
    options = parser.parse_args()
    config = settings(["seed=" + options.seed, *options.set])
    data = read_configured(config)
    names = [device_of(bundle) for bundle in example_bundles()]
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(config.distributed))
        teachers: dict[str, Teacher]
        caller = online = None
        if options.teachers == "inside":
            teachers = {t.name: t for t in map(Inside, example_bundles())}
        else:
            connection = stack.enter_context(
                connect(parse_broker(options.teachers), name=f"coordinator-{ranks.rank}")
            )
            caller, fleet = connection.caller, connection.fleet

            def online() -> dict[str, str]:
                return {device.name: device.card.bundle for device in fleet.devices()}

            devices = fleet.wait(names=names, timeout_s=_ALL_THERE_S)
            cache = stack.enter_context(RememberedAnswers(options.cache / str(ranks.rank)))
            ledger = EncodingLedger()
            patience_s = config.devices.patience_s
            teachers = {
                d.name: RemoteTeacher(caller, d.card, cache, ledger, patience_s=patience_s)
                for d in devices
            }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.monotonic()
        result = train(
            config,
            data,
            shared(teachers, ranks),
            folder,
            Ending(options.at, list(options.kill)),
            online,
            ranks=ranks,
        )
        seconds = time.monotonic() - began
        received = 0
        if caller is not None:
            received = sum(b.received for methods in caller.wire.values() for b in methods.values())
        outcome = Outcome(
            accuracy=result.accuracy["fedsa"],
            seconds=round(seconds, 1),
            by_stage={stage: round(s, 1) for stage, s in result.seconds.items()},
            bytes_received=received,
            lost=tuple(one.teacher for one in result.lost),
            chosen=tuple(sorted(result.selections[-1].selection.weights)),
        )
        if ranks.first:
            sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
