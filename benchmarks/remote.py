"""What it costs that the teachers are elsewhere: in accuracy, in time, on a slow link, with devices lost.

    python -m benchmarks.remote [--seeds 3] [--only inside loopback links link lost torchrun]

The demo's eight teachers and photographs, one thread for everybody: an idle machine of two cores will do.

inside      the teachers are in the training process, and answer in fp16 as a device does
loopback    each is on an agent of its own, over a broker on this machine
links       each agent is behind a link of 10 Mbit/s of its own (needs root, for network namespaces)
link        all of them are behind one link of 10 Mbit/s
lost        three of the eight agents are killed, two of them selected ones: once as these are asked, once after
            half of the rounds
torchrun    two processes train together

Every outcome is a line; the last line of output is a JSON object.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import fmean, pstdev

import msgspec

from benchmarks.example_networks import example_bundles
from benchmarks.remote_run import SETTINGS, Outcome, device_of, settings
from benchmarks.transport_link import slow_links, why_no_link
from coordinator import processes
from coordinator.broker import local_broker
from coordinator.demo import EXAMPLES
from edge_teacher.contract.errors import CheckFailed, FedsaError
from edge_teacher.keys import private_key_at

CASES = ("inside", "loopback", "links", "link", "lost", "torchrun")
LOST = 3
"""Of eight: 30 %, rounded up."""
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@contextmanager
def agents(
    urls: Sequence[str], folder: Path, within: Sequence[tuple[str, ...]] = ((),)
) -> Iterator[dict[str, int]]:
    """One agent for each of the demo's teachers, as a process: its device's name -> its process id.

    `urls` of the broker and `within`, what they are run through, are dealt to them in turn.
    """
    private_key_at(folder / "coordinator.key")
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for bundle, url, through in zip(
            example_bundles(), cycle(urls), cycle(within), strict=False
        ):
            device = device_of(bundle)
            command = [
                *(*through, sys.executable, "-m", "edge_teacher", "run", "--device", device),
                *("--broker", url, "--bundle", str(bundle), "--threads", "1"),
                *("--owner-key", str(EXAMPLES / "teachers" / "owner.pub")),
                *("--coordinator-key", str(folder / "coordinator.pub")),
                *("--state", str(folder / device)),
            ]
            log = folder / f"{device}.log"
            started[device] = processes.start(command, log, environment=_ONE_THREAD)
        yield {device: process.pid for device, process in started.items()}
    finally:
        processes.stop(list(started.values()))


def run(*arguments: str, within: tuple[str, ...] = (), world: int = 1) -> Outcome:
    """One training, in a process of its own, or in `world` of them. Raises CheckFailed if it fails."""
    module = ["-m", "benchmarks.remote_run"]
    if world > 1:
        module = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            *module,
        ]
    with tempfile.TemporaryDirectory() as cache:
        command = [*within, sys.executable, *module, *arguments, "--cache", cache]
        done = subprocess.run(
            command,
            env={**os.environ, **_ONE_THREAD},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        words = done.stderr.strip()[-2000:]
        raise CheckFailed(f"{' '.join(command)} ended with {done.returncode}: {words}")
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=Outcome)


def on_loopback(seed: int, more: Sequence[str], world: int = 1) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with local_broker(folder / "broker") as broker, agents([str(broker.address)], folder):
            url = str(broker.address)
            return run("--teachers", url, "--seed", str(seed), *more, world=world)


def with_devices_lost(seed: int, more: Sequence[str], at: str, chosen: tuple[str, ...]) -> Outcome:
    """Of the `LOST` devices two are of those that the run selects, `chosen`: what hurts most."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (
            local_broker(folder / "broker") as broker,
            agents([str(broker.address)], folder) as pids,
        ):
            others = [device for device in pids if device not in chosen]
            lost = [*chosen[:2], *others][:LOST]
            return run(
                *("--teachers", str(broker.address), "--seed", str(seed)),
                *("--at", at, "--kill", *(str(pids[device]) for device in lost)),
                *more,
            )


def over_slow_links(seed: int, more: Sequence[str], count: int) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with slow_links(folder, count) as links, agents(links.urls, folder, links.there):
            return run("--teachers", links.urls[0], "--seed", str(seed), *more, within=links.here)


class Found:
    """Outcomes by case, each printed as it comes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[Outcome]] = {}

    def note(self, case: str, seed: int, outcome: Outcome) -> None:
        self.outcomes.setdefault(case, []).append(outcome)
        stages = ", ".join(f"{stage} {s:g}" for stage, s in outcome.by_stage.items())
        lost = f"; lost: {', '.join(outcome.lost)}" if outcome.lost else ""
        print(
            f"{case}, seed {seed}: {outcome.accuracy:.2%}, {outcome.seconds:.1f} s ({stages}), "
            f"{outcome.bytes_received / 1e6:.1f} MB received{lost}",
            flush=True,
        )

    def against(self, case: str, base: str) -> dict[str, float]:
        """Paired by seed: points of accuracy more, and times as long, on average."""
        pairs = list(zip(self.outcomes[case], self.outcomes[base], strict=False))
        return {
            "seeds": len(pairs),
            "points": round(100 * fmean(a.accuracy - b.accuracy for a, b in pairs), 2),
            "times": round(fmean(a.seconds / b.seconds for a, b in pairs), 3),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of inside and loopback")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=SETTINGS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    half_time = f"round {settings(options.set).aggregation.rounds // 2 + 1}"
    more = ["--set", *options.set]
    found = Found()
    why = why_no_link()
    try:
        for seed in range(options.seeds):
            if "inside" in options.only:
                found.note("inside", seed, run("--teachers", "inside", "--seed", str(seed), *more))
            if "loopback" in options.only:
                found.note("loopback", seed, on_loopback(seed, more))
        for case, count in (("links", len(example_bundles())), ("link", 1)):
            if case in options.only and why:
                print(f"{case}: not measured, {why}")
            elif case in options.only:
                found.note(case, 0, over_slow_links(0, more, count))
        if "lost" in options.only:
            whole = found.outcomes.get("loopback") or [on_loopback(0, more)]
            for case, at in (("lost as they are asked", "ask"), ("lost at half time", half_time)):
                found.note(case, 0, with_devices_lost(0, more, at, whole[0].chosen))
        if "torchrun" in options.only:
            found.note("torchrun", 0, on_loopback(0, more, world=2))
    except FedsaError as error:
        print(f"remote: {error}", file=sys.stderr)
        return error.exit_code
    told: dict[str, object] = {"outcomes": found.outcomes}
    bases = dict.fromkeys(("loopback", "links", "link"), "inside")
    for case in found.outcomes:
        base = bases.get(case, "loopback")
        if case != "inside" and base in found.outcomes:
            told[f"{case} against {base}"] = found.against(case, base)
    if "inside" in found.outcomes:
        points = [100 * outcome.accuracy for outcome in found.outcomes["inside"]]
        told["standard deviation of inside over seeds, in points"] = round(pstdev(points), 2)
    print(msgspec.json.encode(told).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
