"""Every message as a struct. Tensors travel beside them in the frame, under the names given here.

Unknown fields are ignored and every field added after 1.0 has a default, so a newer minor version is
understood by an older peer.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_teacher.contract.limits import Limits

Dtype = Literal["f16", "f32", "u8"]
FeatureForm = Literal["maps", "pooled", "attention"]
EngineState = Literal["none", "building", "ready", "failed"]


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything on the wire."""


class Empty(Wire, frozen=True):
    """A request or an answer that needs no words."""


# ── who is there ─────────────────────────────────────────────────────────────────────────────


class State(Wire, frozen=True):
    """Birth (`online`), and as last will death. Retained on `<device>/state`."""

    online: bool
    session: str
    """Changes with every start of the agent: what it held in memory before is gone."""
    software: str
    protocol: str
    since_unix_s: float
    leaving: bool = False
    """With `online: false`: it left in good order, and will not be back in a moment. Since 1.1."""


class TapInfo(Wire, frozen=True):
    """One feature map a teacher gives."""

    channels: int
    height: int
    width: int


class TeacherInfo(Wire, frozen=True):
    """What an owner tells of a teacher. Class names and training data stay with the owner."""

    name: str
    version: int
    input_size: tuple[int, int]
    """(height, width) the network works at; the graph resizes whatever it is given."""
    taps: dict[str, TapInfo]
    saliency_tap: str
    saliency_size: tuple[int, int]
    saliency_kind: str
    gives_logits: bool = False


class RuntimeInfo(Wire, frozen=True):
    """What executes the graphs."""

    name: str
    version: str
    provider: str
    """ONNX Runtime's execution provider, or the GPU that TensorRT runs on."""
    threads: int
    precision: str = "fp32"
    """Of the graph it executes: `fp32`, `fp16`, or `int8` with the dialect. Since 1.3."""
    engine: EngineState = "none"
    """Of a TensorRT engine: whether there is one, or what became of it. Since 1.3."""
    engine_progress: float = 0.0
    """How much of it is built, from 0 to 1, while it is `building`. Since 1.3."""
    detail: str = ""
    """What else should be known: why an engine failed, or what is answered on the CPU. Since 1.3."""
    gpu: str = ""
    """Name and architecture, where there is one. Since 1.3."""
    ms_per_image: tuple[float, ...] = ()
    """Measured on this device at the batches 1 and 32; empty where there was no choice to make. Since 1.3."""
    why_not: dict[str, str] = {}
    """The runtimes that are not used, and why. Since 1.3."""


class StudentStatus(Wire, frozen=True):
    """One deployed task on one device. Versions are 0 where there is none."""

    task: str
    active_version: int = 0
    previous_version: int = 0
    candidate_version: int = 0
    state: Literal["empty", "downloading", "verified", "active", "failed"] = "empty"
    problem: str = ""
    canary_agreement: float | None = None
    """Share of the canary batch answered as the bundle expects, on this device."""
    canary_ms_per_image: float | None = None
    runtime_file: str = ""
    """Which of the bundle's dialects this device runs."""


class Card(Wire, frozen=True):
    """What a device is and what may be asked of it. Retained on `<device>/card`."""

    device: str
    bundle: str
    """SHA-256 of the teacher's bundle: answers of the same bundle may be remembered."""
    teacher: TeacherInfo
    runtime: RuntimeInfo
    limits: Limits
    students: tuple[StudentStatus, ...] = ()
    encodings: tuple[str, ...] = ("f16", "f32")
    """What its answers can travel as: dtypes, and `zstd` for tensors packed besides. Since 1.1."""


class AnswerTimes(Wire, frozen=True):
    """How long one method's answers took, from the arrival of the request. Since 1.3."""

    count: int
    """Since the agent's start."""
    total_s: float
    """Of all of them together."""
    p50_ms: float | None = None
    """Of the last five to ten minutes; nil if nothing was answered in them."""
    p99_ms: float | None = None
    """As the median."""


class Telemetry(Wire, frozen=True):
    """How a device is. QoS 0 on `<device>/telemetry`."""

    uptime_s: float
    rss_bytes: int
    load_1min: float
    temperature_c: float | None = None
    """Of the hottest zone."""
    queued: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    images_held: int = 0
    temperatures_c: dict[str, float] = {}
    """By thermal zone, `-thermal` left out. Since 1.3."""
    power_w: dict[str, float] = {}
    """By rail, as the board names them. Since 1.3."""
    gpu_load: float | None = None
    """0 to 1. Since 1.3."""
    memory_available_bytes: int | None = None
    """What the kernel could still give (MemAvailable). Since 1.3."""
    memory_limit_bytes: int | None = None
    """Of the control group the agent runs in; nil without a limit. Since 1.3."""
    throttled: bool | None = None
    """Whether heat or the supply slows the device down now; nil where nothing tells. Since 1.3."""
    throttling: str = ""
    """By what. Since 1.3."""
    answer_times: dict[str, AnswerTimes] = {}
    """By method. Since 1.3."""
    runtime: RuntimeInfo | None = None
    """What executes the teacher now; why others do not is in the card. Since 1.3."""
    unavailable: dict[str, str] = {}
    """What this device does not tell, and why. Since 1.3."""


# ── questions about images ───────────────────────────────────────────────────────────────────


class PutImages(Wire, frozen=True):
    """A piece of a block of images; tensor `data: u8[k]` (k may be 0: "have you got it?").

    `block` is the SHA-256 over the shape and the bytes of `uint8[N, H, W, 3]` (see `image_block_id`).
    """

    block: str
    shape: tuple[int, int, int, int]
    offset: int = 0


class Received(Wire, frozen=True):
    """How much of an upload the device holds; it is whole when `next_offset == total_bytes`."""

    next_offset: int
    total_bytes: int


class SaliencyQuery(Wire, frozen=True):
    """Answer: tensor `saliency: dtype[N, S, S]` in [0, 1].

    As u8 with `saliency.scale: f32[1]` and `saliency.zero: f32[1]`; value = u8 * scale + zero.
    """

    block: str
    dtype: Dtype = "f16"


class FeaturesQuery(Wire, frozen=True):
    """Answer: tensor `features`, `[N, C, h, w]` for maps and `[N, C]` for the pooled forms.

    `attention` pools under the tensor `attention: f16|f32[N, s, s]` that comes with the query. As u8
    with `features.scale: f32[C]` and `features.zero: f32[C]`; value = u8 * scale + zero, by channel.
    """

    block: str
    tap: str = ""
    """Empty: the tap the saliency is computed at."""
    form: FeatureForm = "maps"
    mirrored: bool = False
    """Left and right exchanged before the network sees them: saves sending the mirror images."""
    dtype: Dtype = "f16"
    saliency: bool = False
    """The answer has the tensor `saliency` of SaliencyQuery besides, from the same pass through the graph, of
    the images as the network saw them. A device before 1.3 leaves it out. Since 1.3."""


class PredictQuery(Wire, frozen=True):
    """Asks the active student of `task`.

    Answer: tensor `logits: f32[N, classes]`, of a dense task `[N, classes, H, W]` at the size the student
    works at.
    """

    task: str
    block: str


class Answered(Wire, frozen=True):
    """Goes with the tensors of an answer."""

    compute_ms: float
    student_version: int = 0
    classes: tuple[str, ...] = ()
    encode_ms: float = 0.0
    """Spent on bringing the values into the dtype asked for. Since 1.1."""
    encode_error: float = 0.0
    """Root mean square of what the dtype lost, over that of the values. Since 1.1."""
    task_kind: str = "single-label"
    """Of a student's answer: what kind of task it answers. Since 1.2."""
    decision: str = "top-1"
    """Of a student's answer: how it is read off the logits, `top-1` or `each` (above 0). Since 1.2."""


# ── students ─────────────────────────────────────────────────────────────────────────────────


class StudentOffer(Wire, frozen=True):
    """A piece of a student bundle; tensor `data: u8[k]`. Answer: StudentOffered."""

    task: str
    version: int
    digest: str
    """SHA-256 of the whole bundle, hexadecimal."""
    total_bytes: int
    offset: int = 0


class StudentOffered(Wire, frozen=True):
    """How much of the bundle the device holds, and what it makes of it."""

    received: Received
    status: StudentStatus


class StudentCommand(Wire, frozen=True):
    """`student.activate` (that version), `student.status` and `student.rollback`. Answer: StudentStatus."""

    task: str
    version: int = 0


# ── transport ────────────────────────────────────────────────────────────────────────────────


class Problem(Wire, frozen=True):
    """The body of every answer whose status is not 200."""

    code: int
    message: str
    retry_after_s: float | None = None


class Chunk(Wire, frozen=True):
    """A piece of a frame above 1 MiB; tensor `data: u8[k]`."""

    offset: int
    total_bytes: int
    crc32: int
    sha256: str
    """Of the whole frame."""


class Control(Wire, frozen=True):
    """On `<device>/ctl`: about the answer with this correlation id."""

    kind: Literal["cancel", "resend", "credit", "done"]
    """`cancel`: nobody waits any more. `done`: the whole answer has arrived (since 1.1)."""
    correlation: bytes
    respond_to: str = ""
    ranges: tuple[tuple[int, int], ...] = ()
    """For `resend`: (offset, length) of what is missing."""
    credits: int = 0
    """For `credit`: how many more chunks the receiver can take."""
