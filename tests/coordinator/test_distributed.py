"""Several processes that train one student, started with torchrun as two machines would be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from coordinator.amalgamation.task import Losses
from coordinator.checkpoints import Record, Run
from coordinator.config import Config, DistributedConfig
from coordinator.data import LabelledImages, TaskData, as_several, read_labelled
from coordinator.loop import Drawn, Lesson, Loop
from coordinator.optimisation import OneCycle
from coordinator.progress import Silent
from coordinator.ranks import Apart, Ranks, joined, speaking
from coordinator.report import read_report
from coordinator.requirements import require_shares
from coordinator.settings import load_config
from coordinator.shared_teachers import shared
from coordinator.student import accuracy, load_student, predict
from coordinator.training import train
from edge_teacher.contract.errors import Busy, UsageError
from tests.brokers import Mosquitto, free_port
from tests.coordinator.liars import SPOILT, Liar
from tests.coordinator.local_teacher import coloured_images, random_teacher
from tests.coordinator.small_fleet import SmallFleet, small_fleet
from tests.coordinator.test_training import Interrupted, Watch
from tests.examples import ROOT

T = TypeVar("T")

LONG = ("--aggregation.rounds", "400")


@pytest.fixture
def fleet(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, mosquitto.address, transfer=601) as fleet:
        yield fleet


def process(
    arguments: list[str], log: Path, rank: int | None = None, port: int = 0, master: str = ""
) -> subprocess.Popen[bytes]:
    """`fedsa`; with a rank, as torchrun starts one of two."""
    environment = dict(os.environ)
    if rank is not None:
        environment |= {
            **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            **{"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)},
            "MASTER_ADDR": master or "127.0.0.1",
        }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", *arguments],
            **{"cwd": ROOT, "env": environment, "stdout": output, "stderr": output},
        )


@pytest.mark.timeout(180)
def test_two_processes_share_the_questions_and_end_as_one_does(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert process(fleet.train(tmp_path / "one", "--name", "run"), log).wait() == 0, log.read_text()
    alone = fleet.asked.take()
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "coordinator.cli"),
    ]
    done = subprocess.run(
        [*torchrun, *fleet.train(tmp_path / "two", "--name", "run", "--deploy")],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 120},
    )
    assert done.returncode == 0, done.stderr
    together = fleet.asked.take()
    # The same questions, each about half of the images, and none of them twice.
    assert len(together) == 2 * len(alone)
    assert set(together.values()) == {1}

    reports = [read_report(tmp_path / n / "run") for n in ("one", "two")]
    for network in ("scratch", "fedsa"):
        curves = [[point.loss for point in report.curves[network]] for report in reports]
        assert curves[1] == pytest.approx(curves[0], rel=0.2, abs=0.02), network
    test = read_labelled(tmp_path / "test.npz")
    one, two = (load_student(tmp_path / n / "run" / "student.pt") for n in ("one", "two"))
    ours, theirs = accuracy(one, test.images, test.labels), accuracy(two, test.images, test.labels)
    assert theirs == pytest.approx(ours, abs=0.05)
    agree = predict(one, test.images).argmax(1) == predict(two, test.images).argmax(1)
    assert np.mean(agree) > 0.9
    # Deployed once, by the first.
    assert set(reports[1].accuracy.deployed or {}) == {"left", "right"}


@pytest.mark.timeout(120)
def test_a_process_that_dies_ends_the_others_with_a_sentence(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    port = free_port()
    arguments = fleet.train(tmp_path / "runs", "--name", "run", *LONG)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    both = [process(arguments, log, rank, port) for rank, log in enumerate(logs)]
    try:
        end = time.monotonic() + 60
        while "round 2" not in logs[0].read_text():
            assert both[0].poll() is None, logs[0].read_text()
            assert time.monotonic() < end, logs[0].read_text()
            time.sleep(0.05)
        both[1].send_signal(signal.SIGKILL)
        assert both[0].wait(timeout=30) == 1
    finally:
        for left in both:
            left.kill()
            left.wait()
    said = logs[0].read_text()
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("fedsa: another process of this run has ended")


def test_processes_that_do_not_meet_are_told_where_they_looked(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = fleet.train(tmp_path / "runs", "--distributed.join_s", "2")
    assert process(arguments, log, 1, port).wait(timeout=60) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"fedsa: process 1 of 2 did not meet the others at 127.0.0.1:{port}")
    assert "Traceback" not in log.read_text()


def in_two(what: Callable[[Ranks], T]) -> list[T]:
    """What `what` returns in each of two processes that have joined."""
    port = free_port()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return [f.result(60) for f in [pool.submit(_join, what, rank, port) for rank in (0, 1)]]


def _join(what: Callable[[Ranks], T], rank: int, port: int) -> T:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(DistributedConfig(join_s=30, silence_s=30)) as ranks:
        return what(ranks)


def ask_four_times(ranks: Ranks) -> list[object]:
    teacher = random_teacher("t", 1)
    (asked,) = shared({"t": teacher}, ranks).values()
    images = coloured_images(7, 3, seed=0)[0]
    answers: list[object] = [
        asked.saliency(images),
        asked.pooled(images, mirrored=True),
        asked.attended(images, attention()),
        asked.features(images[:1]),  # fewer than there are processes
    ]
    return [*answers, dict(teacher.asked)]


def attention() -> np.ndarray:
    return np.random.default_rng(0).random((7, 4, 4)).astype(np.float32)


@dataclass(frozen=True)
class Found:
    """What one of two processes found when it tried everything."""

    answers: list[object]
    refusal: str
    statistics: list[float]
    difference: str
    failure: str
    own_failure: str
    options: tuple[list[float], object]
    lost: list[tuple[str, str]]
    selections: list[dict[str, float]]
    weights: list[float]


def try_everything(ranks: Ranks) -> Found:
    return Found(
        ask_four_times(ranks),
        ask_one_that_refuses(ranks),
        even_out(ranks),
        differ(ranks),
        first_fails(ranks),
        fail_in_a_step(ranks),
        train_with_every_option(ranks),
        *train_with_one_that_lies_to_one_process(ranks),
    )


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return in_two(try_everything)


def test_a_shared_teacher_gives_all_processes_what_one_would_have_heard(found: list[Found]) -> None:
    images, alone = coloured_images(7, 3, seed=0)[0], random_teacher("t", 1)
    expected = [alone.saliency(images), alone.pooled(images, mirrored=True)]
    expected.append(alone.attended(images, attention()))
    for rank, answers in enumerate(each.answers for each in found):
        for theirs, ours in zip(answers, [*expected, alone.features(images[:1])], strict=False):
            assert np.allclose(theirs, ours, atol=1e-6)  # type: ignore[call-overload]
        share = 4 if rank == 0 else 3
        asked = {"saliency": share, "pooled": share, "attended": share, "features": 1 - rank}
        assert answers[-1] == asked


class Refusing:
    name = identity = "r"

    def saliency(self, images: np.ndarray) -> np.ndarray:
        if images[0, 0, 0, 0] == 1:
            raise Busy("the device is busy", retry_after_s=3)
        return np.zeros((len(images), 2, 2), np.float32)


def ask_one_that_refuses(ranks: Ranks) -> str:
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    (asked,) = shared({"r": Refusing()}, ranks).values()  # type: ignore[dict-item]
    try:
        asked.saliency(images)
    except Busy as error:
        return f"{error} {error.retry_after_s}"
    return "answered"


def test_what_one_process_is_refused_is_refused_to_all(found: list[Found]) -> None:
    assert [each.refusal for each in found] == ["the device is busy 3"] * 2


def even_out(ranks: Ranks) -> list[float]:
    net = nn.BatchNorm2d(2)
    with torch.no_grad():
        net.running_mean.fill_(ranks.rank)  # type: ignore[union-attr]
        net.running_var.fill_(4 - 2 * ranks.rank)  # type: ignore[union-attr]
    ranks.even_out([net])
    return [*net.running_mean.tolist(), *net.running_var.tolist()]  # type: ignore[union-attr]


def test_batch_norms_statistics_are_made_equal(found: list[Found]) -> None:
    assert [each.statistics for each in found] == [[0.5, 0.5, 3.0, 3.0]] * 2


def differ(ranks: Ranks) -> str:
    try:
        ranks.require_same("the data", "x" if ranks.first else "y")
    except UsageError as error:
        return str(error)
    return "same"


def test_other_data_is_named(found: list[Found]) -> None:
    for each in found:
        assert each.difference.startswith("the data of process 1 are not those of process 0")


def first_fails(ranks: Ranks) -> str:
    def fail() -> None:
        raise UsageError("there is no run")

    try:
        ranks.first_does(fail)
    except UsageError as error:
        return str(error)
    return "went on"


def test_what_fails_in_the_first_fails_in_all(found: list[Found]) -> None:
    assert [each.failure for each in found] == ["there is no run"] * 2


class Failing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this network fails by itself")


def fail_in_a_step(ranks: Ranks) -> str:
    lesson = Lesson(
        name="lesson",
        nets={},
        trained=[nn.Linear(2, 2)],
        images=[4],
        epochs=1,
        cycle=OneCycle(0.1, 1),
        draw=lambda batches, random: (Drawn.of(batches[0], 0, random),),
        loss=lambda drawn: (Failing()(drawn.index), Losses(0.0)),
    )
    run = Run(Path("not written"), Record(config={}, data="", teachers={}), {}, written=False)
    loop = Loop(run, Silent(), batch=4, weight_decay=0.0, checkpoint_s=9.0, ranks=ranks)
    try:
        loop.learn(lesson, torch.Generator().manual_seed(0))
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_a_network_that_fails_by_itself_is_no_process_that_is_gone(found: list[Found]) -> None:
    assert [each.own_failure for each in found] == ["this network fails by itself"] * 2


def test_a_peer_that_is_gone_is_told_from_an_error_of_ones_own() -> None:
    lines = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms",
    )
    for line in lines:
        with pytest.raises(Apart, match="another process of this run has ended"), speaking():
            raise RuntimeError(line)
    with pytest.raises(Apart), speaking():
        raise torch.distributed.DistNetworkError("the store is gone")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), speaking():
        torch.ones(2, 3) @ torch.ones(2, 3)


def train_with_every_option(ranks: Ranks) -> tuple[list[float], object]:
    """(the student's weights, what was kept): with a dropout, and all that is off by default.

    Interrupted and gone on with, it ends the same to the bit.
    """
    data = TaskData(
        LabelledImages(*coloured_images(24, 3, seed=0), ("a", "b", "c")),
        coloured_images(40, 3, seed=1)[0],
    )
    fleet = {"a": random_teacher("a", 1), "b": random_teacher("b", 2)}
    settings = {
        **{"threads": "1", "batch": "16", "selection.k": "2", "aggregation.rounds": "1"},
        **{"scratch.epochs": "0", "warmup.epochs": "1", "finetune.epochs": "3"},
        **{"aggregation.weights": "learnt", "aggregation.agreement": "true"},
        **{"finetune.average": "0.5", "finetune.held_out": "0.25"},
        "student.module": "tests.coordinator.students.own_network:resnet",
        "student.feature_layer": "layer4",
    }
    config = load_config(None, settings | {"checkpoint_s": "0"}, {})
    asked = shared(fleet, ranks)
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        result = train(config, data, asked, Path(one), ranks=ranks)
        with pytest.raises(Interrupted):
            train(config, data, asked, Path(other), Watch("fine-tune", 2), ranks=ranks)
        resumed = train(config, data, asked, Path(other), ranks=ranks)
    whole, parts = (r.student.state_dict() for r in (result, resumed))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    weights = torch.cat([value.flatten().float() for value in whole.values()])
    return weights.tolist(), result.adapted


def test_every_option_is_the_same_in_all_processes(found: list[Found]) -> None:
    (weights, kept), (others, theirs) = (each.options for each in found)
    assert others == pytest.approx(weights, abs=1e-6)
    assert kept == theirs
    assert kept is not None


def train_with_one_that_lies_to_one_process(
    ranks: Ranks,
) -> tuple[list[tuple[str, str]], list[dict[str, float]], list[float]]:
    """(who was lost and when, the weights of every selection, some of the student's)."""
    spoil = SPOILT["wrong shape"] if not ranks.first else lambda answer: answer
    liar = Liar("c", 3, "pooled", spoil, after=4)  # honest about the probe images
    fleet = {"a": random_teacher("a", 1), "b": random_teacher("b", 2), "c": liar}
    data = TaskData(
        LabelledImages(*coloured_images(24, 3, seed=0), ("a", "b", "c")),
        coloured_images(40, 3, seed=1)[0],
    )
    settings = {"threads": "1", "batch": "16", "student.channels": "8", "selection.k": "3"}
    rounds = {"aggregation.rounds": "1", "scratch.epochs": "0", "warmup.epochs": "1"}
    config = load_config(None, settings | rounds | {"finetune.epochs": "1"}, {})
    with TemporaryDirectory() as folder:
        result = train(config, data, shared(fleet, ranks), Path(folder), ranks=ranks)
    weights = torch.cat([value.flatten().float() for value in result.student.state_dict().values()])
    return (
        [(one.teacher, one.stage) for one in result.lost],
        [dict(made.selection.weights) for made in result.selections],
        weights.tolist(),
    )


def test_all_set_the_same_teacher_aside_and_learn_from_the_same_others(found: list[Found]) -> None:
    for each in found:
        assert each.lost == [("c", "features before round 1")]
        assert each.selections == [{"a": 0.5, "b": 0.5}]
    assert found[0].weights == pytest.approx(found[1].weights, abs=1e-6)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words), joined(DistributedConfig()):
        pass


def test_a_batch_that_cannot_be_shared_is_said() -> None:
    data = TaskData(
        LabelledImages(*coloured_images(12, 3, seed=0), ("a", "b", "c")),
        coloured_images(9, 3, seed=1)[0],
    )
    with pytest.raises(UsageError, match="choose a multiple of 3 from 6 on"):
        require_shares(Config(), as_several(data), Ranks(0, 3))
    with pytest.raises(UsageError, match="the probe set has 12 images and 8 processes"):
        require_shares(Config(), as_several(data), Ranks(0, 8))


def test_a_gpu_that_is_not_there_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="finds 0 CUDA devices"):
        Ranks().device("cuda")
