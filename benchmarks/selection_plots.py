"""The pictures of docs/selection.md, from benchmarks/results/selection.json.

python -m benchmarks.selection_plots
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import msgspec
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.selection_study import NAMED, RESULTS, SCORES, Line

DOCS = Path(__file__).parent.parent / "docs"
_WORDS = {
    "evidence": "evidence (default)",
    "evidence_attended": "evidence, and under saliency",
    "logme_attended": "LogME under saliency, greedy",
    "logme": "LogME, greedy",
    "cosine": "cosine of saliency (paper)",
    "best_singles": "best single teachers (oracle)",
}


def main() -> None:
    matplotlib.use("Agg")
    found = msgspec.json.decode((RESULTS / "selection.json").read_bytes())
    every = msgspec.convert(found["selection"], list[Line])
    plain = [line for line in every if not line.left_out]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for axis, fleet in zip(axes, ("alike", "mixed"), strict=True):
        lines = [x for x in plain if x.fleet == fleet and x.k == 3 and x.labels_per_class == 50]
        _by_score(axis, lines, fleet)
    axes[0].set_ylabel("share of what a selection can gain")
    figure.tight_layout()
    figure.savefig(DOCS / "selection-scores.png", dpi=110)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for fleet, style in (("alike", "o-"), ("mixed", "s--")):
        for score in ("evidence", "cosine"):
            chosen = [
                x
                for x in plain
                if x.fleet == fleet
                and x.score == score
                and x.task in NAMED
                and x.labels_per_class == 50
            ]
            ks = sorted({x.k for x in chosen})
            axes[0].plot(
                ks,
                [_mean(x.share_mean for x in chosen if x.k == k) for k in ks],
                style,
                label=f"{score}, {fleet}",
            )
        fewer = [
            x
            for x in plain
            if x.fleet == fleet and x.score == "evidence" and x.k == 3 and x.task in NAMED
        ]
        counts = sorted({x.labels_per_class for x in fewer})
        shares = [_mean(x.share_mean for x in fewer if x.labels_per_class == n) for n in counts]
        axes[1].plot(counts, shares, style, label=f"evidence, {fleet}")
    for axis, words in zip(axes, ("teachers selected (k)", "labels per class"), strict=True):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xlabel(words)
        axis.legend(fontsize=8)
    axes[0].set_xticks(range(1, 6))
    axes[1].set_xticks([10, 20, 50])
    axes[0].set_ylabel("mean share, three tasks")
    figure.tight_layout()
    figure.savefig(DOCS / "selection-k.png", dpi=110)


def _by_score(axis: Axes, lines: list[Line], fleet: str) -> None:
    scores = [score for score in SCORES if any(x.score == score for x in lines)]
    for place, score in enumerate(scores):
        shares = [x.share_mean for x in lines if x.score == score]
        axis.plot([place] * len(shares), shares, "o", color="tab:blue", alpha=0.4)
        axis.plot([place - 0.25, place + 0.25], [_mean(shares)] * 2, color="black", linewidth=2)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(scores)), [_WORDS[s] for s in scores], rotation=25, ha="right")
    axis.set_title(f"eight teachers, {fleet}: a point is a task, a bar their mean")
    axis.tick_params(axis="x", labelsize=8)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
