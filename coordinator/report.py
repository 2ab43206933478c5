"""What a run writes: report.json for programs, report.html for people.

`report.json` is a `Report` and nothing else. `report.html` is one file that opens from disk, loads
nothing from anywhere (its own Content-Security-Policy forbids it) and runs no script.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.adapted import Adapted
from coordinator.encodings import EncodingCost
from coordinator.roster import Lost
from edge_teacher.contract.errors import UsageError
from edge_teacher.files import write_atomically
from export.student_report import StudentReport

JSON = "report.json"
HTML = "report.html"
_METRICS = {"mean_iou": "mean IoU", "f1": "F1"}
TOTAL = "total"  # among the seconds: the whole run


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The user's data; counts are images. `test` is None where no test set was given."""

    name: str
    classes: tuple[str, ...]
    probe: int
    transfer: int
    test: int | None = None


class TeacherResult(msgspec.Struct, frozen=True, kw_only=True):
    """One teacher in the last selection of the run.

    Attributes:
        score: q = 2 - d of the method; higher looks more where the student looks.
        similarity: mean over the probe set of 1/2 + cos/2.
        probability: softmax of the rescaled scores.
        weight: its share in the aggregation; 0 where it was not selected.
        reason: why it was or was not selected, in a few words.
        about: what its card says of it (architecture, input size), for people.
    """

    id: str
    score: float
    similarity: float
    probability: float
    selected: bool
    weight: float
    reason: str = ""
    about: str = ""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """On the test set, in the report's `metric`; None for what was not part of the run.

    Attributes:
        scratch: the same network trained on the probe set's labels alone.
        fedsa_fp32, fedsa_int8: the student as trained, and quantised, both on the workstation.
        deployed: device id to what that device answered when asked over MQTT.
    """

    scratch: float | None = None
    fedsa_fp32: float | None = None
    fedsa_int8: float | None = None
    deployed: dict[str, float] | None = None


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """One task of the run: what it was, who was selected for it last, and what came out.

    Attributes:
        kind: `single-label`, `multi-label`, `dense`.
        weight: its share in every loss.
        metrics: of the networks `scratch` and `fedsa` on the test set, by network and name; what counts
            first is `metric`.
        accuracy: as the report's, in this task's `metric`.
        version: of its student; 0 where none was exported.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    probe: int
    test: int | None = None
    weight: float = 1.0
    metric: str
    metrics: dict[str, dict[str, float]] = {}
    accuracy: Accuracy = Accuracy()
    teachers: tuple[TeacherResult, ...] = ()
    student: StudentReport | None = None
    version: int = 0


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a network in training; `images_seen` counts from its very first step."""

    stage: str
    images_seen: int
    loss: float | None = None
    accuracy: float | None = None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the selection before round `number` (from 1) chose: teacher id to weight.

    `stage` is `fine-tune` for a selection that was made after the last round, and else empty.
    """

    number: int
    weights: dict[str, float]
    stage: str = ""


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of MQTT payload between the coordinator and one device, by one method.

    Attributes:
        sent: to the device.
        received: from the device.
    """

    sent: int
    received: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one run, as report.json has it.

    Attributes:
        command: what was called, such as `fedsa demo`.
        started: ISO 8601 with offset.
        broker: name and version; None where none was used.
        strategy: the name of the selection strategy.
        curves: by network (`scratch`, `fedsa`).
        teachers, accuracy: with several tasks the means over them; a weight is the share in the hints.
        student: what its export measured; None where nothing was exported, or several were (`tasks`).
        tasks: each task by itself; one, where the student learnt one.
        metric: what the accuracies are.
        learnt: teacher id to what its hints weighed at last, of 1, where that was learnt; else empty.
        adapted: which weights the fine-tuning ended with; None where that was not to choose.
        bytes_on_wire: device id to method to traffic.
        encodings: device id to encoding (such as `u8+zstd`) to what it was used for and cost.
        lost: teachers that were set aside, in the order in which they were.
        seconds: by stage, in the order in which they ran; `total` is the whole run.
        config: the configuration as it took effect, section to key to value.
        software: version by package.
    """

    command: str
    started: str
    seed: int
    broker: str | None
    task: Task
    strategy: str
    teachers: tuple[TeacherResult, ...]
    rounds: tuple[Round, ...] = ()
    accuracy: Accuracy = Accuracy()
    curves: dict[str, tuple[CurvePoint, ...]] = {}
    student: StudentReport | None = None
    bytes_on_wire: dict[str, dict[str, Traffic]] = {}
    encodings: dict[str, dict[str, EncodingCost]] = {}
    lost: tuple[Lost, ...] = ()
    seconds: dict[str, float] = {}
    config: dict[str, Any] = {}
    software: dict[str, str] = {}
    tasks: tuple[TaskResult, ...] = ()
    metric: str = "accuracy"
    learnt: dict[str, float] = {}
    adapted: Adapted | None = None
    format: Literal[1] = 1


@dataclass(frozen=True)
class Pictures:
    """Probe images and where everybody looks on them; on the page only, never in the JSON.

    Attributes:
        images: uint8[n, H, W, 3].
        student: maps float[n, s, s] in [0, 1].
        teachers: teacher id to maps float[n, S, S] in [0, 1].
        similarities: teacher id to float[n] in [0, 1], the similarity to the student's map.
        likeness: teacher id to the mean of that over all probe images, shown or not.
        labels: n class names, or none.
    """

    images: NDArray[np.uint8]
    student: NDArray[np.float32]
    teachers: dict[str, NDArray[np.float32]]
    similarities: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    likeness: dict[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise UsageError(
                f"the probe pictures are {self.images.dtype}{list(self.images.shape)}, "
                "not uint8[n, H, W, 3]: pass the images as they were sent to the teachers"
            )
        for who, maps in {"the student": self.student, **self.teachers}.items():
            if maps.ndim != 3 or len(maps) != count or 0 in maps.shape[1:]:
                raise UsageError(
                    f"the saliency maps of {who} are {list(maps.shape)}, not [{count}, S, S]: "
                    "pass one map for each picture"
                )
        for who, values in self.similarities.items():
            if values.shape != (count,):
                raise UsageError(
                    f"the similarities of {who} are {list(values.shape)}, not [{count}]: "
                    "pass one number for each picture"
                )
        if self.labels and len(self.labels) != count:
            raise UsageError(
                f"{len(self.labels)} labels for {count} pictures: pass one for each, or none"
            )


def metric_name(metric: str) -> str:
    """`mean_iou` -> "mean IoU"."""
    return _METRICS.get(metric, metric.replace("_", " "))


def write_report(report: Report, pictures: Pictures | None, run_dir: Path) -> None:
    """Write report.html, then report.json, into `run_dir`, each whole or not at all.

    Without `pictures` the page says that no saliency maps were kept.
    """
    # Here, because only writing needs the template engine and pillow; reading a report back does not.
    from coordinator.report_page import render

    page = render(report, pictures)
    document = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomically(run_dir / HTML, page.encode())
    write_atomically(run_dir / JSON, document + b"\n")


def read_report(run_dir: Path) -> Report:
    """The report of a run. Raises UsageError if there is none, or one of another format."""
    path = run_dir / JSON
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise UsageError(f"the report {path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} is not a report this version can read: {error}") from error
