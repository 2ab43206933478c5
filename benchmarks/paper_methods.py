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
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import nn

from benchmarks.paper_data import Split, cifar_task
from benchmarks.paper_local import LocalTeacher, LogitsTeacher, mixed_teachers
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
from coordinator.data import SINGLE, SeveralTasks, TaskData, spread
from coordinator.optimisation import stage_generator
from coordinator.selection.marginal import kernel, log_evidence
from coordinator.student import (
    HeadSpec,
    Student,
    StudentSpec,
    load_student,
    pooled_features,
    predict,
)
from coordinator.training import train

TRANSFER = 10_000
PER_CLASS = {0.01: 50, 0.1: 500}
TOGETHER = ("cifar10-animals", "cifar10-vehicles", "cifar10-mixed")
"""The tasks of one student with three heads."""
ROUNDS = 10
VIEWS, VIEWS_ROUNDS = 3, 4
"""Of the centralised row: 12 passes over the images and three refits, where FedSA has 10 and three."""
METHODS = (
    *("scratch", "transfer", "central_all", "logits_all", "fedsa_paper"),
    *("fedsa_top3", "fedsa_top5", "random3", "fedsa_all"),
)


@dataclass(frozen=True)
class Trial:
    """One cell of the table with one seed. `labels`: as a fraction of CIFAR-10's 50,000.

    `teachers`: alike, those of `paper_teachers`, or mixed, the examples' eight of three architectures.
    """

    method: str
    task: str
    labels: float
    seed: int
    teachers: Literal["alike", "mixed"] = "alike"

    @property
    def name(self) -> str:
        mixed = "mixed-" if self.teachers == "mixed" else ""
        return f"{mixed}{self.method}-{self.task}-{self.labels:g}-{self.seed}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial came to; `accuracy` of the whole test set, `seconds` of one core's time."""

    method: str
    task: str
    labels: float
    seed: int
    accuracy: float
    queries: int
    bytes: int
    seconds: float
    chosen: tuple[str, ...] = ()
    teachers: str = "alike"
    by_task: dict[str, float] = {}
    """Accuracy by task, where one student learnt `TOGETHER`; `accuracy` is their mean."""


def run_trial(trial: Trial, train_split: Split, test_split: Split, work: Path) -> Outcome:
    """Train, and measure on the test sets, which nothing else sees."""
    torch.set_num_threads(1)
    names = TOGETHER if trial.task == "together" else (trial.task,)
    of_task = {
        name: cifar_task(
            train_split,
            test_split,
            name,
            per_class=PER_CLASS[trial.labels],
            transfer=TRANSFER,
            seed=trial.seed,
        )
        for name in names
    }
    blind = {name: TaskData(data.probe, data.transfer) for name, data in of_task.items()}
    unseen = blind[names[0]]
    began = time.process_time()
    if trial.method == "scratch":
        net, teachers, chosen = _scratch(trial, unseen), [], ()
    elif trial.method == "transfer":
        net, teachers, chosen = _transfer(trial, unseen, work)
    else:
        several = SeveralTasks.of(blind) if len(blind) > 1 else unseen
        net, teachers, chosen = _federated(trial, several, work)
    reached = {}
    for name, data in of_task.items():
        assert data.test is not None
        head = name if len(of_task) > 1 else None
        found = predict(net, data.test.images, head).argmax(1)
        reached[name] = float((found == data.test.labels).mean())
    return Outcome(
        method=trial.method,
        task=trial.task,
        labels=trial.labels,
        seed=trial.seed,
        accuracy=float(np.mean(list(reached.values()))),
        queries=sum(t.queries for t in teachers),
        bytes=sum(t.wire_bytes for t in teachers),
        seconds=round(time.process_time() - began, 1),
        chosen=chosen,
        teachers=trial.teachers,
        by_task=reached if len(reached) > 1 else {},
    )


def config_of(trial: Trial) -> Config:
    """The settings of a federated row."""
    few = trial.labels <= 0.01
    base = Config(
        seed=trial.seed,
        threads=1,
        student=StudentConfig(channels=CHANNELS),
        scratch=ScratchConfig(epochs=0),
        aggregation=AggregationConfig(rounds=ROUNDS, refits=3),
        selection=SelectionConfig(every_rounds=ROUNDS),
        finetune=FinetuneConfig(epochs=5 if few else 25, rate=0.005 if few else 0.05),
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
        aggregation = replace(aggregation, rounds=VIEWS_ROUNDS, flips=False)
    return replace(base, selection=selection, aggregation=aggregation)


def _federated(
    trial: Trial, data: TaskData | SeveralTasks, work: Path
) -> tuple[Student, list[LocalTeacher], tuple[str, ...]]:
    if trial.method == "central_all":
        assert isinstance(data, TaskData)
        data = TaskData(data.probe, _views(data.transfer, trial.seed))
    with RememberedAnswers(work / "answers") as cache:
        if trial.teachers == "mixed":
            teachers = mixed_teachers(cache)
        else:
            make = LogitsTeacher if trial.method == "logits_all" else LocalTeacher
            teachers = [make(path_of(index, work), cache) for index in range(COUNT)]
        result = train(
            config_of(trial), data, {t.name: t for t in teachers}, work / "runs" / trial.name
        )
    chosen = {name for one in result.selections for name in one.selection.weights}
    return result.student, teachers, tuple(sorted(chosen))


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
