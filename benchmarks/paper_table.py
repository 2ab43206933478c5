"""The table of the paper on real data, with this kit's methods and its baselines.

    python -m benchmarks.paper_table --data FOLDER [--processes 2] [--only METHOD …]

Every trial is kept when it is done, and not done again: interrupt it when you like. What there is goes
to benchmarks/results/paper_table.json and paper_table.md after every trial. `--data` has cifar10.tar.xz
and tiny_imagenet32_160.tar.xz; teachers that are missing are trained first.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.paper_data import archives, split
from benchmarks.paper_methods import METHODS, TOGETHER, Outcome, Trial, run_trial
from benchmarks.paper_teachers import COUNT, train_teacher
from edge_teacher.contract.errors import FedsaError
from edge_teacher.files import write_atomically

RESULTS = Path(__file__).parent / "results"
OUTCOMES = RESULTS / "outcomes"
"""One file for each trial that is done, kept in the repository: who goes on need not begin."""
PAIRED = ("cifar10", "cifar10-animals", "cifar10-vehicles")


def trials() -> list[Trial]:
    """In the order of what matters, so that a run that is cut short has most of it."""
    first = (
        "scratch",
        "fedsa_top3",
        "random3",
        "fedsa_all",
        "central_all",
        "transfer",
        "fedsa_top5",
    )
    found = [Trial(m, "cifar10", 0.01, 0) for m in (*first, "logits_all", "fedsa_paper")]
    pair = ("fedsa_top3", "random3")
    for seed in range(3):
        found += [Trial(m, task, 0.01, seed) for task in PAIRED for m in (*pair, "scratch")]
    found += [Trial(m, "cifar10", 0.1, 0) for m in ("fedsa_top3", "scratch")]
    for seed in (1, 2):
        found += [Trial(m, "cifar10", 0.01, seed) for m in METHODS]
    for seed in (3, 4):
        found += [Trial(m, task, 0.01, seed) for task in PAIRED for m in pair]
    for seed in (0, 1):
        found += [Trial("fedsa_top3", task, 0.01, seed) for task in ("together", *TOGETHER)]
    for seed in range(3):
        found += [Trial(m, "cifar10", 0.01, seed, "mixed") for m in (*pair, "fedsa_all")]
    tenth = ("scratch", "fedsa_top3", "fedsa_all", "transfer")
    found += [Trial(m, "cifar10", 0.1, seed) for seed in (0, 1) for m in tenth]
    return list(dict.fromkeys(found))


def outcomes() -> list[Outcome]:
    """Of the trials that are done."""
    return [
        msgspec.json.decode(path.read_bytes(), type=Outcome)
        for path in sorted(OUTCOMES.glob("*.json"))
    ]


def write_results(done: list[Outcome], selection: list[dict[str, object]]) -> None:
    alike = [one for one in done if one.teachers == "alike" and not one.by_task]
    rows, pairs, joint = rows_of(alike), paired(alike), together(done)
    mixed = rows_of([one for one in done if one.teachers == "mixed"])
    table = {
        "rows": rows,
        "selection": selection,
        "default_score": "evidence",
        "paired": pairs,
        "mixed_teachers": mixed,
        "together": joint,
    }
    RESULTS.mkdir(exist_ok=True)
    write_atomically(
        RESULTS / "paper_table.json", msgspec.json.format(msgspec.json.encode(table), indent=1)
    )
    write_atomically(RESULTS / "paper_table.md", markdown(rows, pairs, mixed, joint).encode())


def rows_of(done: list[Outcome]) -> list[dict[str, object]]:
    cells = defaultdict(list)
    for one in done:
        cells[one.method, one.task, one.labels].append(one)
    order = {method: i for i, method in enumerate(METHODS)}
    rows: list[dict[str, object]] = []
    for (method, task, labels), found in sorted(
        cells.items(), key=lambda item: (item[0][2], item[0][1], order[item[0][0]])
    ):
        reached = [one.accuracy for one in found]
        rows.append(
            {
                "method": method,
                "task": task,
                "labels": labels,
                "seeds": len(found),
                "mean": round(float(np.mean(reached)), 4),
                "std": round(float(np.std(reached, ddof=1)), 4) if len(found) > 1 else 0.0,
                "queries": round(np.mean([one.queries for one in found])),
                "bytes": round(np.mean([one.bytes for one in found])),
                "seconds": round(float(np.mean([one.seconds for one in found])), 1),
            }
        )
    return rows


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """How much better one method is on the same seeds, in points.

    `points` by task, `mean_points` over the tasks, `interval_95` of that mean over the seeds.
    """

    seeds: int
    points: dict[str, float]
    mean_points: float
    interval_95: tuple[float, float]


def paired(done: list[Outcome]) -> Paired | None:
    """fedsa_top3 less random3 on the same seeds, in points, with a 95 % interval over the seeds."""
    known = {(o.method, o.task, o.seed): o.accuracy for o in done if o.labels <= 0.01}
    by_task = {
        task: [
            100 * (known["fedsa_top3", task, seed] - known["random3", task, seed])
            for seed in range(5)
            if ("fedsa_top3", task, seed) in known and ("random3", task, seed) in known
        ]
        for task in PAIRED
    }
    seeds = min(map(len, by_task.values()))
    if seeds < 2:
        return None
    means = np.mean([gains[:seeds] for gains in by_task.values()], axis=0)
    # Student's t at 97.5 %, by degrees of freedom.
    t = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}[seeds - 1]
    half = t * float(np.std(means, ddof=1)) / seeds**0.5
    mean = float(means.mean())
    return Paired(
        seeds=seeds,
        points={task: round(float(np.mean(gains)), 2) for task, gains in by_task.items()},
        mean_points=round(mean, 2),
        interval_95=(round(mean - half, 2), round(mean + half, 2)),
    )


class Together(msgspec.Struct, frozen=True, kw_only=True):
    """A task learnt with others by one student of three heads, against a student of its own."""

    task: str
    seeds: int
    alone: float
    together: float

    @property
    def points(self) -> float:
        return round(100 * (self.together - self.alone), 2)


def together(done: list[Outcome]) -> list[Together]:
    """Means over the seeds that both have."""
    joint = {o.seed: o.by_task for o in done if o.task == "together"}
    found = []
    for task in TOGETHER:
        alone = {
            o.seed: o.accuracy
            for o in done
            if (o.method, o.task, o.teachers) == ("fedsa_top3", task, "alike") and o.labels <= 0.01
        }
        seeds = sorted(joint.keys() & alone.keys())
        if seeds:
            found.append(
                Together(
                    task=task,
                    seeds=len(seeds),
                    alone=round(float(np.mean([alone[seed] for seed in seeds])), 4),
                    together=round(float(np.mean([joint[seed][task] for seed in seeds])), 4),
                )
            )
    return found


def markdown(
    rows: list[dict[str, object]],
    pairs: Paired | None,
    mixed: list[dict[str, object]],
    joint: list[Together],
) -> str:
    lines = _table(rows)
    if pairs:
        low, high = pairs.interval_95
        by_task = ", ".join(f"{task} {gain:+}" for task, gain in pairs.points.items())
        lines += [
            "",
            f"fedsa_top3 over random3, {pairs.seeds} seeds paired, mean of the three tasks: "
            f"{pairs.mean_points:+} points (95 % interval {low:+} to {high:+}); {by_task}",
        ]
    if mixed:
        lines += ["", "The examples' eight teachers of three architectures:", "", *_table(mixed)]
    if joint:
        lines += [
            *("", "One student with three heads, three teachers selected for each task:", ""),
            "| task | seeds | a student of its own | together | points |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.task} | {one.seeds} | {one.alone:.1%} | {one.together:.1%} | {one.points:+} |"
            for one in joint
        ]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, object]]) -> list[str]:
    lines = [
        "| method | task | labels | seeds | accuracy | queries | MB on the wire | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, std = float(str(row["mean"])) * 100, float(str(row["std"])) * 100
        spread = f" ± {std:.1f}" if row["seeds"] != 1 else ""
        lines.append(
            f"| {row['method']} | {row['task']} | {float(str(row['labels'])):.0%} | {row['seeds']} "
            f"| {mean:.1f}{spread} | {row['queries']:,} | {int(str(row['bytes'])) / 1e6:.0f} "
            f"| {row['seconds']} |"
        )
    return lines


def _run(trial: Trial, data: Path, work: Path) -> Outcome:
    cifar, _ = archives(data)
    return run_trial(trial, split(cifar, "train", work), split(cifar, "test", work), work)


def _train_teacher(index: int, data: Path, work: Path) -> None:
    import torch

    torch.set_num_threads(1)
    _, tiny = archives(data)
    train_teacher(index, split(tiny, "train", work), split(tiny, "val", work), work)


def _selection_rows(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    found: list[dict[str, object]] = msgspec.json.decode(path.read_bytes())["selection"]
    return [x for x in found if not x["left_out"] and x["labels_per_class"] == 50]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the two archives")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="what is kept")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", choices=METHODS)
    options = parser.parse_args()
    console = Console(stderr=True)
    work: Path = options.work
    study = RESULTS / "selection.json"
    try:
        cifar, tiny = archives(options.data)
        for archive, names in ((cifar, ("train", "test")), (tiny, ("train", "val"))):
            for name in names:
                split(archive, name, work)
        OUTCOMES.mkdir(parents=True, exist_ok=True)
        done = {path.stem for path in OUTCOMES.glob("*.json")}
        due = [t for t in trials() if t.name not in done]
        due = [t for t in due if not options.only or t.method in options.only]
        with ProcessPoolExecutor(options.processes) as pool:
            for future in [
                pool.submit(_train_teacher, i, options.data, work) for i in range(COUNT)
            ]:
                future.result()
            running = {pool.submit(_run, trial, options.data, work): trial for trial in due}
            for number, future in enumerate(as_completed(running), start=1):
                trial, outcome = running[future], future.result()
                write_atomically(OUTCOMES / f"{trial.name}.json", msgspec.json.encode(outcome))
                write_results(outcomes(), _selection_rows(study))
                console.print(
                    f"{number}/{len(due)} {trial.name}: {outcome.accuracy:.4f}, {outcome.seconds} s"
                )
        write_results(outcomes(), _selection_rows(study))
    except FedsaError as error:
        console.print(f"paper_table: {error}")
        return error.exit_code
    print((RESULTS / "paper_table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
