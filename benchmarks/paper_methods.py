"""The rows of the paper's table: what each method is, in settings of this kit.

scratch       the student on the labelled images alone
transfer      the student begun from the weights of the teacher with the most evidence, its head fitted,
              then fine-tuned on the labels; centralised, for no owner gives weights away
central_all   all eight teachers' weights in process: they see the very views the student is trained on
logits_all    FedMD-like: class scores of all eight, and nothing of their features
fedsa_paper   as in the paper: whole feature maps, a copy per teacher averaged (fedavg), three sampled
fedsa_top3, fedsa_top5, fedsa_all, random3      this kit: pooled features and soft targets
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from benchmarks.paper_data import Split, cifar_task
from benchmarks.paper_local import LocalTeacher, LogitsTeacher
from benchmarks.paper_teachers import CHANNELS, COUNT, fit_labels, path_of
from coordinator.amalgamation.heads import fit_task_head
from coordinator.answers import RememberedAnswers
from coordinator.augmentation import Jitter
from coordinator.config import (
    AggregationConfig,
    Config,
    FinetuneConfig,
    ScratchConfig,
    SelectionConfig,
    StudentConfig,
)
from coordinator.data import SINGLE, TaskData, spread
from coordinator.optimisation import (
    stage_generator,
)
from coordinator.selection.marginal import kernel, log_evidence
from coordinator.student import (
    HeadSpec,
    Student,
    StudentSpec,
    accuracy,
    load_student,
    pooled_features,
)
from coordinator.training import train

TRANSFER = 10_000
PER_CLASS = {0.01: 50, 0.1: 500}
ROUNDS = 10
VIEWS = 5
METHODS = (
    *("scratch", "transfer", "central_all", "logits_all", "fedsa_paper"),
    *("fedsa_top3", "fedsa_top5", "random3", "fedsa_all"),
)


@dataclass(frozen=True)
class Trial:
    """One cell of the table with one seed. `labels`: as a fraction of CIFAR-10's 50,000."""

    method: str
    task: str
    labels: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.task}-{self.labels:g}-{self.seed}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial came to; `accuracy` of the whole test set."""

    method: str
    task: str
    labels: float
    seed: int
    accuracy: float
    queries: int
    bytes: int
    seconds: float
    chosen: tuple[str, ...] = ()


def run_trial(trial: Trial, train_split: Split, test_split: Split, work: Path) -> Outcome:
    """Train, and measure on the test set, which nothing else sees."""
    torch.set_num_threads(1)
    data = cifar_task(
        train_split,
        test_split,
        trial.task,
        per_class=PER_CLASS[trial.labels],
        transfer=TRANSFER,
        seed=trial.seed,
    )
    test = data.test
    assert test is not None
    unseen = TaskData(data.probe, data.transfer)
    began = time.monotonic()
    if trial.method == "scratch":
        net, teachers, chosen = _scratch(trial, unseen), [], ()
    elif trial.method == "transfer":
        net, teachers, chosen = _transfer(trial, unseen, work)
    else:
        net, teachers, chosen = _federated(trial, unseen, work)
    return Outcome(
        method=trial.method,
        task=trial.task,
        labels=trial.labels,
        seed=trial.seed,
        accuracy=accuracy(net, test.images, test.labels),
        queries=sum(t.queries for t in teachers),
        bytes=sum(t.wire_bytes for t in teachers),
        seconds=round(time.monotonic() - began, 1),
        chosen=chosen,
    )


def config_of(trial: Trial) -> Config:
    """The settings of a federated row."""
    few = trial.labels <= 0.01
    base = Config(
        seed=trial.seed,
        threads=1,
        student=StudentConfig(channels=CHANNELS),
        scratch=ScratchConfig(epochs=0),
        aggregation=AggregationConfig(rounds=ROUNDS),
        selection=SelectionConfig(every_rounds=ROUNDS),
        finetune=FinetuneConfig(epochs=5 if few else 8, rate=0.005 if few else 0.02),
    )
    replace = msgspec.structs.replace
    k = {"fedsa_top3": 3, "fedsa_top5": 5, "random3": 3, "fedsa_paper": 3}.get(trial.method, COUNT)
    strategy = {"random3": "random", "fedsa_paper": "sampled"}.get(trial.method, "evidence")
    selection = replace(base.selection, k=k, strategy="all" if k == COUNT else strategy)
    aggregation = base.aggregation
    if trial.method == "fedsa_paper":
        aggregation = replace(
            aggregation, form="fedavg", hint_maps=1.0, hint_pooled=0.0, soft_targets=0.0
        )
        selection = replace(selection, every_rounds=2)
    if trial.method == "logits_all":
        aggregation = replace(aggregation, soft_targets=0.0)
    if trial.method == "central_all":
        aggregation = replace(aggregation, rounds=ROUNDS // VIEWS, flips=False)
    return replace(base, selection=selection, aggregation=aggregation)


def _federated(
    trial: Trial, data: TaskData, work: Path
) -> tuple[Student, list[LocalTeacher], tuple[str, ...]]:
    make = LogitsTeacher if trial.method == "logits_all" else LocalTeacher
    if trial.method == "central_all":
        data = TaskData(data.probe, _views(data.transfer, trial.seed))
    with RememberedAnswers(work / "answers") as cache:
        teachers = [make(path_of(index, work), cache) for index in range(COUNT)]
        result = train(
            config_of(trial), data, {t.name: t for t in teachers}, work / "runs" / trial.name
        )
    return result.student, teachers, tuple(sorted(result.selections[-1].selection.weights))


def _views(images: np.ndarray, seed: int) -> np.ndarray:
    """VIEWS jittered copies of every image, for teachers that can be asked about each."""
    generator = stage_generator(seed, "views")
    tensor = torch.from_numpy(images)
    return np.concatenate(
        [Jitter.draw(len(images), 4, generator).images(tensor).numpy() for _ in range(VIEWS)]
    )


def _scratch(trial: Trial, data: TaskData) -> Student:
    torch.manual_seed(trial.seed)
    net = Student(StudentSpec.of_images(data.transfer, data.probe.classes, CHANNELS))
    fit_labels(net, data.probe, trial.method, trial.seed, epochs=40, rate=0.05)
    return net.eval()


def _transfer(
    trial: Trial, data: TaskData, work: Path
) -> tuple[Student, list[LocalTeacher], tuple[str, ...]]:
    nets = {index: load_student(path_of(index, work)) for index in range(COUNT)}
    looked = spread(data.probe, 500)
    targets = np.eye(len(looked.classes), dtype=np.float32)[looked.labels]
    best = max(
        nets,
        key=lambda i: log_evidence(
            kernel(pooled_features(nets[i], looked.images).numpy()), targets
        ),
    )
    net = nets[best]
    heads = {SINGLE: HeadSpec("single-label", data.probe.classes)}
    student = Student(msgspec.structs.replace(net.spec, heads=heads))
    student.stages.load_state_dict(net.stages.state_dict())
    fitted = fit_task_head(
        pooled_features(student, data.probe.images),
        data.probe.labels,
        len(data.probe.classes),
        pooled_features(student, data.transfer),
        5,
        trial.seed,
    )
    head = student.head()
    assert isinstance(head, nn.Linear)
    fitted.write_to(head)
    fit_labels(student, data.probe, trial.method, trial.seed, epochs=30, rate=0.01)
    return student.eval(), [], (f"teacher-{best}",)
