"""A run that is killed over and over, without a warning, ends as one that never was."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from coordinator.questions import OUTSTANDING
from tests.brokers import Mosquitto
from tests.coordinator.small_fleet import DEVICES, Question, small_fleet

OPTIONS = [
    *("--aggregation.weights", "learnt", "--aggregation.agreement", "true"),
    *("--finetune.average", "0.5", "--finetune.held_out", "0.2"),
]


def session(arguments: list[str], log: Path) -> None:
    """`fedsa` with these arguments, in this process, which is its own."""
    from coordinator.cli import main

    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main(arguments))


def forks() -> ForkServerContext:
    """Processes that begin with torch loaded: else loading it is most of what there is to kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["coordinator.pipeline", "coordinator.cli", "torch._dynamo", "torch.onnx", "onnxscript"]
    )
    return context


def start(context: ForkServerContext, arguments: list[str], log: Path) -> ForkServerProcess:
    process = context.Process(target=session, args=(arguments, log))
    process.start()
    return process


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("options", "kills_in_all", "questions"),
    # Where everybody looks on the probe images; what they see there, mirrored too; and so of the transfer
    # images, which are two blocks.
    [([], 20, 1 + 2 + 4), (OPTIONS, 10, 1 + 2 + 4 + 2)],
    ids=["by default", "with everything"],
)
def test_a_run_killed_at_any_moment_ends_the_same_and_asks_nothing_twice(
    tmp_path: Path,
    mosquitto: Mosquitto,
    options: list[str],
    kills_in_all: int,
    questions: int,
) -> None:
    log = tmp_path / "train.log"
    context = forks()
    moments = random.Random(1)
    with small_fleet(tmp_path, mosquitto.address) as fleet:
        whole = fleet.train(tmp_path / "whole", "--name", "run", *options)
        began = time.monotonic()
        process = start(context, whole, log)
        process.join()
        whole_s = time.monotonic() - began
        assert process.exitcode == 0, log.read_text()
        expected = (tmp_path / "whole" / "run" / "student.pt").read_bytes()
        every = fleet.asked.take()
        assert len(every) == len(DEVICES) * questions
        assert set(every.values()) == {1}

        kills, number = 0, 0
        while kills < kills_in_all:  # a run that ends before that is followed by another
            number += 1
            runs = tmp_path / f"killed-{number}"
            arguments = fleet.train(runs, "--name", "run", "--checkpoint_s", "0.05", *options)
            asked: Counter[Question] = Counter()
            lost = 0
            while True:
                process = start(context, arguments, log)
                if kills < kills_in_all:
                    process.join(moments.uniform(whole_s / 100, whole_s / 12))
                    if process.exitcode is None:
                        os.kill(process.pid or 0, signal.SIGKILL)
                        kills += 1
                process.join()
                now = fleet.asked.take()
                asked += now
                if process.exitcode == 0:
                    break
                assert process.exitcode == -signal.SIGKILL, log.read_text()
                # What was on its way when it was killed is not known, and asked again.
                lost += min(sum(now.values()), OUTSTANDING * len(DEVICES))
                if (runs / "run" / "command.json").exists():
                    arguments = ["train", "--runs", str(runs), "--resume", "run"]
            student = (runs / "run" / "student.pt").read_bytes()
            assert student == expected, f"run {number} differs after {kills} kills"
            assert set(asked) == set(every)
            assert sum(asked.values()) - len(every) <= lost
