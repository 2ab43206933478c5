"""The configuration of `fedsa train`: one TOML file, environment variables and flags over it.

Every key is a field below, with its type, range, default and meaning; nothing else is a key, and
the example that `example_config` gives is made from the same fields. A key is `section.key`: in the
file under `[section]`, in the environment `FEDSA_SECTION_KEY`, as a flag `--section.key`. Several tasks
are `[tasks.NAME]` in the file and `--tasks.NAME.key` as flags; no variable sets them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

TASKS = "tasks"
"""The section whose tables are tasks."""

Architecture = Literal["residual", "mobilenet", "vgg"]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Image folders, tar archives (or folders inside them), or .npz files."""

    probe: Annotated[str, Meta(description="labelled images: <class>/<name>.jpg")] = ""
    transfer: Annotated[str, Meta(description="unlabelled images of the same kind")] = ""
    test: Annotated[str, Meta(description="labelled images to measure by; empty: none")] = ""
    kind: Annotated[str, Meta(description="of the task: single-label, multi-label or dense")] = (
        "single-label"
    )


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of several tasks that a student learns at once; its name is that of its section."""

    kind: Annotated[str, Meta(description="single-label, multi-label or dense")] = "single-label"
    probe: Annotated[str, Meta(description="labelled images of this task")] = ""
    test: Annotated[str, Meta(description="labelled images to measure by; empty: none")] = ""
    transfer: Annotated[
        str, Meta(description="unlabelled images, joined with those of data.transfer")
    ] = ""
    weight: Annotated[float, Meta(gt=0, description="of this task in every loss")] = 1.0


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the devices are met, and with `mqtts://` what to show there."""

    url: Annotated[str, Meta(description="mqtt://HOST:PORT or mqtts://HOST:PORT")] = ""
    ca: Annotated[str, Meta(description="certificate authority of the broker")] = ""
    certificate: Annotated[str, Meta(description="the coordinator's certificate")] = ""
    key: Annotated[str, Meta(description="the coordinator's private key")] = ""
    name: Annotated[str, Meta(description="the coordinator's id (its certificate's CN)")] = (
        "coordinator"
    )


class DevicesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long devices are waited for, and how many may be lost."""

    patience_s: Annotated[
        float,
        Meta(gt=0, le=86400, description="seconds that one answer may take; then it is set aside"),
    ] = 120.0
    least: Annotated[
        int, Meta(ge=1, description="teachers without which the run ends; the others may be lost")
    ] = 1


class StudentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network that is trained and deployed."""

    architecture: Annotated[
        Architecture, Meta(description="one of ours: residual, mobilenet or vgg")
    ] = "residual"
    channels: Annotated[
        int,
        Meta(ge=8, le=256, description="of the first stage; the feature map has 6 times as many"),
    ] = 24
    module: Annotated[
        str, Meta(description="a network of your own, package.module:factory; empty: one of ours")
    ] = ""
    feature_layer: Annotated[
        str, Meta(description="of the module; its output is the feature map; empty: the module's")
    ] = ""
    device: Annotated[
        Literal["cpu", "cuda"], Meta(description="where it is trained: cpu or cuda")
    ] = "cpu"

    largest_drop: Annotated[
        float,
        Meta(ge=0, le=1, description="of accuracy by quantising, as a fraction; more is refused"),
    ] = 0.02

    def __post_init__(self) -> None:
        if self.feature_layer and not self.module:
            raise ValueError("feature_layer names a layer of student.module, which is not set")


class WarmupConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student learns from the probe set alone, so that it looks somewhere at all."""

    epochs: Annotated[int, Meta(ge=1, description="passes over the probe set")] = 10
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.05


class SelectionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which teachers take part, by where they and the student look."""

    strategy: Annotated[
        Literal["evidence", "logme", "cosine", "sampled", "random", "all", "oracle"],
        Meta(
            description="evidence or logme (of labels), cosine or sampled (the paper's), random, all, oracle"
        ),
    ] = "evidence"
    k: Annotated[int, Meta(ge=1, description="how many teachers are chosen")] = 3
    every_rounds: Annotated[int, Meta(ge=1, description="select again after so many rounds")] = 7
    sticky: Annotated[
        float, Meta(ge=0, description="added to the score of who was selected last; 0: nothing is")
    ] = 0.0


class AggregationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student learns what the selected teachers say of the transfer set. A weight 0 is off."""

    form: Annotated[
        Literal["joint", "fedavg"],
        Meta(description="joint: one student, all losses; fedavg: a copy per teacher, averaged"),
    ] = "joint"
    rounds: Annotated[int, Meta(ge=1, description="how often, in all")] = 14
    epochs: Annotated[int, Meta(ge=1, description="passes over the images in each round")] = 1
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.1
    hint_maps: Annotated[float, Meta(ge=0, description="weight of feature map hints")] = 0.0
    hint_pooled: Annotated[float, Meta(ge=0, description="weight of pooled feature hints")] = 1.0
    soft_targets: Annotated[
        float, Meta(ge=0, description="weight of the task head's soft predictions")
    ] = 1.0
    weights: Annotated[
        Literal["selection", "learnt"],
        Meta(description="of the teachers' hints: the selection's, or learnt from these on"),
    ] = "selection"
    agreement: Annotated[
        bool,
        Meta(
            description="hints count less where the teacher looks elsewhere; asks saliency of all images"
        ),
    ] = False
    temperature: Annotated[
        float, Meta(gt=0, description="of the soft predictions; below 1 sharpens")
    ] = 0.5
    views: Annotated[
        int,
        Meta(
            ge=0, description="fixed random views of each unlabelled image that are asked about too"
        ),
    ] = 0
    refits: Annotated[
        int,
        Meta(
            ge=0, description="times the task head is fitted again, on the student's features too"
        ),
    ] = 1
    flips: Annotated[
        bool, Meta(description="ask for mirrored images too: twice the queries, better features")
    ] = True

    def __post_init__(self) -> None:
        if not (self.hint_maps or self.hint_pooled or self.soft_targets):
            raise ValueError("hint_maps, hint_pooled and soft_targets are all 0: nothing to learn")
        if self.agreement and not (self.hint_maps or self.hint_pooled):
            raise ValueError(
                "agreement is about hints, and hint_maps and hint_pooled are both 0; set one of them, or "
                "agreement to false"
            )
        if self.weights == "learnt" and not (self.hint_maps or self.hint_pooled):
            raise ValueError(
                "weights are to be learnt of hints, and hint_maps and hint_pooled are both 0; set one of "
                'them, or weights to "selection"'
            )


class HeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The task head: logistic regression on the selected teachers' pooled features."""

    folds: Annotated[int, Meta(ge=2, description="of the cross-validation of its penalty")] = 5


class FinetuneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fresh head is trained on the probe set."""

    epochs: Annotated[int, Meta(ge=0, description="passes over the probe set")] = 5
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.005
    average: Annotated[
        float,
        Meta(ge=0, le=1, description="share of its steps, the last, whose weights are averaged"),
    ] = 0.0
    held_out: Annotated[
        float,
        Meta(ge=0, le=0.5, description="share of the labels to choose its best epoch by"),
    ] = 0.0
    patience: Annotated[
        int, Meta(ge=0, description="epochs without a better one before it stops; 0: it does not")
    ] = 0

    def __post_init__(self) -> None:
        if not self.epochs and (self.average or self.held_out):
            raise ValueError("epochs is 0: there is nothing to average, nor to choose an epoch of")
        if self.patience and not self.held_out:
            raise ValueError(
                "patience waits for a better epoch by held-out labels, and held_out is 0; set it to 0.2, say"
            )


class ScratchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The baseline: the same network trained on the probe set alone."""

    epochs: Annotated[int, Meta(ge=0, description="passes over the probe set; 0: no baseline")] = 40
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.05


class DistributedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Several processes, started with torchrun, that train one student."""

    join_s: Annotated[
        float, Meta(gt=0, description="seconds in which all processes must have met")
    ] = 120.0
    silence_s: Annotated[
        float, Meta(gt=0, description="seconds that a process waits for what another is doing")
    ] = 1800.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="of every random choice")] = 0
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="of the processor; 0: all its cores")
    ] = 0
    batch: Annotated[int, Meta(ge=2, description="images in one step of training")] = 64
    shift: Annotated[int, Meta(ge=0, description="pixels a training image is shifted at most")] = 4
    weight_decay: Annotated[float, Meta(ge=0, description="of every weight, in every step")] = 5e-4
    checkpoint_s: Annotated[
        float, Meta(ge=0, description="seconds of training that a killed process loses at most")
    ] = 10.0
    broker: BrokerConfig = BrokerConfig()
    devices: DevicesConfig = DevicesConfig()
    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    warmup: WarmupConfig = WarmupConfig()
    selection: SelectionConfig = SelectionConfig()
    aggregation: AggregationConfig = AggregationConfig()
    head: HeadConfig = HeadConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    scratch: ScratchConfig = ScratchConfig()
    distributed: DistributedConfig = DistributedConfig()
    tasks: dict[str, TaskConfig] = {}

    def __post_init__(self) -> None:
        if self.tasks and (self.data.probe or self.data.test):
            raise ValueError(
                "data.probe and data.test are of a single task, and there are [tasks]: give each of these "
                "its own probe and test"
            )
