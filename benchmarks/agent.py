"""The agent against the bare session it runs, in one run: python -m benchmarks.agent

The agent's process and that of the bare session may use one core, the same one, and take turns on it; the
broker and the coordinators have the others. So what MQTT, encoding and threads cost the device is not hidden
by a core that a device may not have to spare. The last line is one JSON object:

throughput_vs_session          images/s, saliency and pooled features, queries of 32 images, four outstanding,
                               over the session's at its best batch; the smaller of a demo teacher's and the
                               larger network's, and of wall and CPU time (below)
sixteen_coordinators_vs_session   the same with 16 coordinators that have two queries of 2 images outstanding
two_queries_vs_session         as the first, but asked as two queries, saliency and features, of one block
*_wall_vs_session, *_cpu_vs_session   by time, and by CPU time of the two processes: where others use the
                               machine, the first says who was given the core, the second what was done with it
cold_start_s                   from the start of the process to its first answer, the slowest of the demo's
                               teachers, each the median of several starts
rss_over_session_mb            resident memory of the agent after all that, over the bare session's process
idle_cpu                       share of a core, over 20 s without a question
install_mb                     `pip install --target` of this project with `edge`: millions of bytes in files
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.agent_load import (
    DEVICE,
    Births,
    Coordinators,
    Rate,
    agent_command,
    bare_session,
    process_cpu_s,
    process_rss_bytes,
    started,
    upload,
)
from benchmarks.agent_session import BATCHES
from benchmarks.agent_teachers import LARGE_SIDE, demo, large
from coordinator.broker import LocalBroker, local_broker
from edge_teacher.contract.messages import Answered, SaliencyQuery

MB = 1e6
ROOT = Path(__file__).resolve().parent.parent
SIXTEEN = 16
IDLE_S = 20.0

Medians = dict[str, dict[str, float]]


def cores() -> tuple[int, list[int]]:
    """(the device's, the others')."""
    mine = sorted(os.sched_getaffinity(0))
    return mine[0], mine[1:] or mine


def compare(
    bundle: Path,
    owner: Path,
    side: tuple[int, int],
    broker: LocalBroker,
    folder: Path,
    rounds: int,
    seconds: float,
) -> tuple[Medians, int, int, float]:
    """(medians by what is measured, agent's and session's resident bytes, idle share of a core)."""
    device, _ = cores()
    with ExitStack() as stack:
        births = Births(broker.address, stack)
        said = folder / f"{bundle.stem}.log"
        log = stack.enter_context(said.open("ab"))
        command = agent_command(broker.address, bundle, owner, folder / "state")
        agent = stack.enter_context(started(command, device, stdout=log, stderr=log))
        births.wait()
        bare = stack.enter_context(bare_session(bundle, owner, device))
        one = Coordinators(broker.address, 1, stack)
        many = Coordinators(broker.address, SIXTEEN, stack)
        large_blocks = one.upload(side, 32, 32)
        small_blocks = many.upload(side, 2, 8)
        wait_until_learnt(said)
        bare.find_best(BATCHES)
        asks: dict[str, Callable[[], Rate]] = {
            "session": lambda: bare.rate(seconds),
            "throughput": lambda: one.rate(large_blocks, 32, 4, seconds, agent.pid),
            "two_queries": lambda: one.rate(large_blocks, 32, 4, seconds, agent.pid, apart=True),
            "sixteen_coordinators": lambda: many.rate(small_blocks, 2, 2, seconds, agent.pid),
        }
        found: dict[str, list[Rate]] = {name: [] for name in asks}
        for _ in range(rounds):
            for name, ask in asks.items():
                found[name].append(ask())
        medians = {
            name: {
                "wall": statistics.median(rate.per_s for rate in rates),
                "cpu": statistics.median(rate.per_cpu_s for rate in rates),
            }
            for name, rates in found.items()
        }
        for name, of in medians.items():
            print(
                f"{bundle.stem:>10} {name:>21}: {of['wall']:8.0f} images/s {of['cpu']:8.0f} "
                f"images/CPU s {of['wall'] / medians['session']['wall']:6.3f} "
                f"{of['cpu'] / medians['session']['cpu']:6.3f}"
                + (f"  (batch {bare.batch})" if name == "session" else ""),
                flush=True,
            )
        resident = process_rss_bytes(agent.pid), process_rss_bytes(bare.pid)
        idle = idle_share(agent.pid)
    return medians, *resident, idle


def wait_until_learnt(log: Path, deadline_s: float = 120) -> None:
    """While it is idle the agent tries sizes of a step for three choices of outputs, and says what it found."""
    end = time.monotonic() + deadline_s
    while log.read_text().count(": fastest with ") < 3:
        if time.monotonic() > end:
            raise RuntimeError(f"the agent has not learnt its batch sizes: {log.read_text()}")
        threading.Event().wait(0.1)


def idle_share(pid: int) -> float:
    threading.Event().wait(1)
    before, began = process_cpu_s(pid), time.perf_counter()
    threading.Event().wait(IDLE_S)
    return (process_cpu_s(pid) - before) / (time.perf_counter() - began)


def cold_start_s(index: int, broker: LocalBroker, folder: Path, starts: int) -> float:
    """The coordinator is there, and asks as soon as it hears of the birth."""
    bundle, owner = demo(index)
    taken = []
    for _ in range(starts):
        with ExitStack() as stack:
            births = Births(broker.address, stack)
            (caller,) = Coordinators(broker.address, 1, stack).callers
            log = stack.enter_context((folder / "agent.log").open("ab"))
            command = agent_command(broker.address, bundle, owner, folder / "state")
            began = time.perf_counter()
            stack.enter_context(started(command, None, stdout=log, stderr=log))
            births.wait()
            block = upload(caller, (32, 32), 1, seed=0)
            caller.call(DEVICE, "saliency", SaliencyQuery(block=block), answer=Answered)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def install_bytes(folder: Path) -> int:
    """What lies on a device after its installation, without what Python compiles for itself later."""
    target = folder / "install"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"),
            *("--target", str(target), f"{ROOT}[edge]"),
        ],
        check=True,
    )
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def worst(of: list[Medians], name: str, clock: str) -> float:
    return min(medians[name][clock] / medians["session"][clock] for medians in of)


def ratios(of: list[Medians], name: str) -> dict[str, float]:
    clocks = {clock: worst(of, name, clock) for clock in ("wall", "cpu")}
    return {
        f"{name}_vs_session": min(clocks.values()),
        **{f"{name}_{clock}_vs_session": ratio for clock, ratio in clocks.items()},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--seconds", type=float, default=2.0, help="of each round")
    options.add_argument("--starts", type=int, default=3, help="of each of the demo's teachers")
    options.add_argument("--no-install", action="store_true", help="without pip install")
    chosen = options.parse_args()
    device, others = cores()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.sched_setaffinity(0, others)  # the broker's too, and given up only by who is pinned
        broker = stack.enter_context(local_broker(folder))
        print(f"{broker.name}; device on core {device}, broker and coordinators on {others}")
        compared = []
        agents = []
        for (bundle, owner), side in (
            (demo(0), (32, 32)),
            (large(folder), (LARGE_SIDE, LARGE_SIDE)),
        ):
            medians, agent, bare, idle = compare(
                bundle, owner, side, broker, folder, chosen.rounds, chosen.seconds
            )
            compared.append(medians)
            agents.append((agent - bare, idle))
        os.sched_setaffinity(0, [device, *others])
        cold = max(cold_start_s(index, broker, folder, chosen.starts) for index in range(8))
        installed = None if chosen.no_install else install_bytes(folder) / MB
    result: dict[str, float | None] = {
        **ratios(compared, "throughput"),
        **ratios(compared, "sixteen_coordinators"),
        "cold_start_s": cold,
        "rss_over_session_mb": max(more for more, _ in agents) / MB,
        "idle_cpu": max(share for _, share in agents),
        "install_mb": installed,
        **ratios(compared, "two_queries"),
    }
    sys.stdout.write(
        json.dumps({k: None if v is None else round(v, 4) for k, v in result.items()}) + "\n"
    )


if __name__ == "__main__":
    main()
