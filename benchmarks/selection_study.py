"""How good are the sets of teachers that a strategy selects? Many tasks, two fleets, every set judged.

    python -m benchmarks.selection_study --data FOLDER

A set is judged by a linear probe on its concatenated pooled features, fitted to the labelled images and
measured on the whole test set; `share = (probe(chosen) - mean over all sets) / (best set - mean)`: 0 is
a set drawn by lot, 1 the best there is. What there is goes to benchmarks/results/selection.json and,
as pictures, to docs/; judged sets are kept in the work folder, and a study goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.paper_data import TASKS, Split, archives, cifar_task, split
from benchmarks.paper_teachers import CHANNELS, COUNT, fit_labels, path_of
from benchmarks.study_fleets import Fleet, alike, mixed
from coordinator.data import LabelledImages
from coordinator.selection import Evidence, common_size, similarities, transfer_distance
from coordinator.selection.logme import logme
from coordinator.selection.marginal import kernel, log_evidence
from coordinator.selection.probe import probe_accuracy
from coordinator.student import Student, StudentSpec, grad_cam
from edge_teacher.contract.errors import FedsaError
from edge_teacher.files import write_atomically

RESULTS = Path(__file__).parent / "results"
NAMED = ("cifar10", "cifar10-animals", "cifar10-vehicles")
FEWER = (10, 20)

Chosen = tuple[int, ...]
Score = Callable[["Case", int, Sequence[int]], Chosen]
"""(case, k, candidates) -> the set chosen, sorted."""


@dataclass
class Case:
    """One task, seed and fleet: what strategies see, and what is true."""

    fleet: Fleet
    task: str
    seed: int
    probe: LabelledImages
    test: LabelledImages
    kept: Path

    def __post_init__(self) -> None:
        self.targets = np.eye(len(self.probe.classes), dtype=np.float32)[self.probe.labels]
        self._judged: dict[str, float] = {}
        self._seen: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        if self.kept.exists():
            self._judged = msgspec.json.decode(self.kept.read_bytes())

    def judge(self, chosen: Chosen) -> float:
        """The truth about a set."""
        key = ",".join(map(str, chosen))
        if key not in self._judged:
            probe, test = zip(*(self._pooled(i) for i in chosen), strict=True)
            self._judged[key] = probe_accuracy(
                np.concatenate(probe, axis=1),
                self.probe.labels,
                np.concatenate(test, axis=1),
                self.test.labels,
            )
        return self._judged[key]

    def _pooled(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of the probe and of the test images."""
        if index not in self._seen:
            self._seen[index] = (
                self.fleet.pooled(index, self.probe.images),
                self.fleet.pooled(index, self.test.images),
            )
        return self._seen[index]

    def keep(self) -> None:
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.kept, msgspec.json.encode(self._judged))

    def worth(self, chosen: Chosen, candidates: Sequence[int]) -> tuple[float, float]:
        """(gain over the mean set, gain of the best set), of sets as large among the candidates."""
        every = [self.judge(s) for s in combinations(candidates, len(chosen))]
        return self.judge(chosen) - float(np.mean(every)), max(every) - float(np.mean(every))


# ── scores ───────────────────────────────────────────────────────────────────────────────────


def greedy(value: Callable[[list[int]], float], k: int, candidates: Sequence[int]) -> Chosen:
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in candidates if i not in chosen]
        chosen.append(max(rest, key=lambda i: value([*chosen, i])))
    return tuple(sorted(chosen))


def by_evidence(case: Case, k: int, candidates: Sequence[int], labels: int = 0) -> Chosen:
    """The default: flip-averaged pooled features; `labels` per class, 0 for all there are."""
    rows = _rows(case.probe, labels)
    seen = {i: kernel(case.fleet.averaged(i, case.probe.images)[rows]) for i in candidates}
    return _by_kernels(seen, case.targets[rows], k, candidates)


def by_attended_evidence(case: Case, k: int, candidates: Sequence[int]) -> Chosen:
    """The same with what each teacher sees where it looks beside it."""
    images = case.probe.images
    seen = {
        i: kernel(case.fleet.averaged(i, images)) + kernel(case.fleet.attended(i, images))
        for i in candidates
    }
    return _by_kernels(seen, case.targets, k, candidates)


def _by_kernels(
    seen: dict[int, NDArray[np.float64]],
    targets: NDArray[np.float32],
    k: int,
    candidates: Sequence[int],
) -> Chosen:
    def value(chosen: list[int]) -> float:
        return log_evidence(sum((seen[i] for i in chosen[1:]), seen[chosen[0]]), targets)

    return greedy(value, k, candidates)


def by_logme(case: Case, k: int, candidates: Sequence[int]) -> Chosen:
    """LogME (You et al., 2021) on plain features, neither rooted nor scaled, greedily."""
    seen = {i: case.fleet.pooled(i, case.probe.images) for i in candidates}
    return greedy(
        lambda chosen: logme(np.concatenate([seen[i] for i in chosen], axis=1), case.targets),
        k,
        candidates,
    )


def by_attended_logme(case: Case, k: int, candidates: Sequence[int]) -> Chosen:
    """LogME of features pooled under the teacher's own saliency, greedily."""
    seen = {i: case.fleet.attended(i, case.probe.images) for i in candidates}
    return greedy(
        lambda chosen: logme(np.concatenate([seen[i] for i in chosen], axis=1), case.targets),
        k,
        candidates,
    )


def by_cosine(case: Case, k: int, candidates: Sequence[int]) -> Chosen:
    """The paper's: whose saliency is most like that of a student warmed up on the labels."""
    student = _warmed_up(case)
    maps = grad_cam(student, case.probe.images)
    looks = {i: case.fleet.saliency(i, case.probe.images) for i in candidates}
    size = common_size(Evidence(maps, {str(i): m for i, m in looks.items()}))
    distance = {i: transfer_distance(similarities(maps, looks[i], size)) for i in candidates}
    return tuple(sorted(sorted(candidates, key=lambda i: distance[i])[:k]))


def by_singles(case: Case, k: int, candidates: Sequence[int]) -> Chosen:
    """An oracle that knows how good each teacher is alone, and not how they add up."""
    return tuple(sorted(sorted(candidates, key=lambda i: -case.judge((i,)))[:k]))


SCORES: dict[str, Score] = {
    "evidence": by_evidence,
    "evidence_attended": by_attended_evidence,
    "logme_attended": by_attended_logme,
    "logme": by_logme,
    "cosine": by_cosine,
    "best_singles": by_singles,
}


def _rows(probe: LabelledImages, labels: int) -> NDArray[np.int64]:
    if not labels:
        return np.arange(len(probe))
    rows = [np.flatnonzero(probe.labels == c)[:labels] for c in range(len(probe.classes))]
    return np.concatenate(rows)


def _warmed_up(case: Case) -> Student:
    torch.manual_seed(case.seed)
    spec = StudentSpec.of_images(case.probe.images, case.probe.classes, CHANNELS)
    student = Student(spec)
    fit_labels(student, case.probe, f"warm-up {case.seed}", case.seed, epochs=10, rate=0.05)
    return student.eval()


# ── the study ────────────────────────────────────────────────────────────────────────────────


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the study: the share over seeds, of the sums (a ratio of means is steadier)."""

    fleet: str
    score: str
    task: str
    k: int
    share_mean: float
    share_std: float
    points: float
    best_points: float
    seeds: int
    labels_per_class: int = 50
    left_out: bool = False


Gains = dict[tuple[str, str, str, int, int, bool], list[tuple[float, float]]]


def study(cases: Sequence[Case], console: Console) -> tuple[Gains, dict[str, int]]:
    gains: Gains = defaultdict(list)
    intruders: dict[str, int] = defaultdict(int)
    for number, case in enumerate(cases, start=1):
        every = range(COUNT)

        def note(
            score: str,
            chosen: Chosen,
            candidates: Sequence[int],
            labels: int = 50,
            left_out: bool = False,
            case: Case = case,
        ) -> None:
            key = (case.fleet.name, score, case.task, len(chosen), labels, left_out)
            gains[key].append(case.worth(chosen, candidates))

        for name, score in SCORES.items():
            note(name, score(case, 3, every), every)
        if case.task in NAMED and case.seed < 2:
            for k in (1, 2, 4, 5):
                note("evidence", by_evidence(case, k, every), every)
                note("cosine", by_cosine(case, k, every), every)
            for labels in FEWER:
                note("evidence", by_evidence(case, 3, every, labels), every, labels)
            for gone in every:
                rest = [i for i in every if i != gone]
                note("evidence", by_evidence(case, 3, rest), rest, left_out=True)
            _intrude(case, intruders)
        case.keep()
        told = {n: gains[case.fleet.name, n, case.task, 3, 50, False][-1] for n in SCORES}
        shares = ", ".join(f"{n} {a / b:.2f}" for n, (a, b) in told.items())
        console.print(f"{number}/{len(cases)} {case.fleet.name} {case.task} {case.seed}: {shares}")
    return gains, intruders


def _intrude(case: Case, intruders: dict[str, int]) -> None:
    """A teacher that never learnt anything, and a copy of the best, among the candidates."""
    seen = {i: kernel(case.fleet.averaged(i, case.probe.images)) for i in range(COUNT)}
    first = by_evidence(case, 1, range(COUNT))[0]
    seen[COUNT] = kernel(case.fleet.untrained(case.probe.images))
    seen[COUNT + 1] = seen[first]
    chosen = _by_kernels(seen, case.targets, 3, sorted(seen))
    intruders["cases"] += 1
    intruders["untrained_chosen"] += COUNT in chosen
    intruders["copy_beside_original"] += first in chosen and COUNT + 1 in chosen


def lines(gains: Gains) -> list[Line]:
    found = []
    for (fleet, score, task, k, labels, left_out), values in gains.items():
        points, best = (np.array(part) for part in zip(*values, strict=True))
        found.append(
            Line(
                fleet=fleet,
                score=score,
                task=task,
                k=k,
                share_mean=round(float(points.sum() / best.sum()), 3),
                share_std=round(float(np.std(points / best)), 3),
                points=round(100 * float(points.mean()), 2),
                best_points=round(100 * float(best.mean()), 2),
                seeds=len(values),
                labels_per_class=labels,
                left_out=left_out,
            )
        )
    return found


def cases_of(
    fleets: Sequence[Fleet], train: Split, test: Split, work: Path, seeds: int, others: int
) -> list[Case]:
    found = []
    for task in TASKS:
        for seed in range(seeds if task in NAMED else others):
            data = cifar_task(train, test, task, per_class=50, transfer=1, seed=seed)
            assert data.test is not None
            for fleet in fleets:
                digest = hashlib.sha256(fleet.identity.encode()).hexdigest()[:12]
                kept = work / "judged" / f"{digest}-{task}-{seed}.json"
                found.append(Case(fleet, task, seed, data.probe, data.test, kept))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the two archives")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="what is kept")
    parser.add_argument("--seeds", type=int, default=4, help="of the three named tasks")
    parser.add_argument("--others", type=int, default=2, help="seeds of the other tasks")
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)
    try:
        cifar, _ = archives(options.data)
        train, test = (split(cifar, name, options.work) for name in ("train", "test"))
        missing = [i for i in range(COUNT) if not path_of(i, options.work).exists()]
        if missing:
            console.print(
                f"teachers {missing} are not trained: run benchmarks.paper_teachers first"
            )
            return 2
        fleets = [alike(options.work), mixed(options.work)]
        cases = cases_of(fleets, train, test, options.work, options.seeds, options.others)
        gains, intruders = study(cases, console)
    except FedsaError as error:
        console.print(f"selection_study: {error}")
        return error.exit_code
    result = {"selection": lines(gains), "intruders": dict(intruders), "default_score": "evidence"}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(
        RESULTS / "selection.json", msgspec.json.format(msgspec.json.encode(result), indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
