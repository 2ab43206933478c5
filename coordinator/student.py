"""The student: a small net that fits a device, quantises well and says where it looks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coordinator.config import Architecture
from coordinator.data import SINGLE, LabelledImages
from coordinator.files import load_tensors, save_tensors
from coordinator.kinds import Features, Kind, kind_named
from coordinator.students.architectures import ARCHITECTURES
from coordinator.students.imported import FeatureLayer, flattened, imported, run_once
from edge_teacher.contract.errors import UsageError

_BATCH = 250


class HeadSpec(msgspec.Struct, frozen=True):
    """What one task's head answers."""

    kind: str
    classes: tuple[str, ...]


class StudentSpec(msgspec.Struct, frozen=True):
    """All that is needed, besides its weights, to build a student again.

    `mean` and `std` are per channel, for pixels scaled to [0, 1]; the net applies them itself.
    `architecture` and `channels` name one of ours; where `module` is set (`package.module:factory`)
    it is a user's instead, and `feature_layer` the layer of it that is its feature map.
    """

    heads: dict[str, HeadSpec]
    """By task."""
    height: int
    width: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    architecture: Architecture = "residual"
    module: str = ""
    feature_layer: str = ""

    @classmethod
    def of_images(
        cls,
        images: NDArray[np.uint8],
        heads: tuple[str, ...] | Mapping[str, HeadSpec],
        channels: int,
        *,
        architecture: Architecture = "residual",
        module: str = "",
        feature_layer: str = "",
    ) -> StudentSpec:
        """A spec whose normalisation is that of `images`, uint8[N, H, W, 3].

        `heads` by task, or the classes of the only one, which is single-label.
        """
        pixels = images.reshape(-1, 3).astype(np.float32) / 255
        r, g, b = (float(v) for v in pixels.mean(axis=0, dtype=np.float64))
        # A channel that never varies must not divide by zero.
        sr, sg, sb = (max(float(v), 1e-3) for v in pixels.std(axis=0, dtype=np.float64))
        if isinstance(heads, tuple):
            heads = {SINGLE: HeadSpec("single-label", heads)}
        height, width = images.shape[1:3]
        return cls(
            *(dict(heads), height, width, channels, (r, g, b), (sr, sg, sb)),
            *(architecture, module, feature_layer),
        )

    def head(self, task: str | None = None) -> tuple[str, HeadSpec]:
        """A task and what its head answers. Raises UsageError if there is none, or no name and several."""
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads.items()))
        if task is None or task not in self.heads:
            wanted = "no task is named" if task is None else f"it has none for {task!r}"
            raise UsageError(f"This student has heads for {', '.join(self.heads)}, and {wanted}.")
        return task, self.heads[task]


class Student(nn.Module):
    """One backbone, and a head for each task: `images uint8[N, H, W, 3] -> logits float[N, classes]`,
    or [N, classes, H, W] of a dense task. Normalisation is part of the net.

    Our architectures are of convolution, batch norm and ReLU only, so that batch norm folds away and
    INT8 loses little; their last feature map is an eighth of the image on each side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.stages = (
            imported(spec.module, spec.feature_layer, spec.height, spec.width)
            if spec.module
            else ARCHITECTURES[spec.architecture](spec.channels)
        )
        self.features = _channels(self.stages, spec)
        size = spec.height, spec.width
        self.heads = nn.ModuleList(
            kind_named(head.kind).head(self.features, len(head.classes), size)
            for head in spec.heads.values()
        )

    def kind(self, task: str | None = None) -> Kind:
        """Raises UsageError as `StudentSpec.head`, as do all methods with a task."""
        return kind_named(self.spec.head(task)[1].kind)

    def head(self, task: str | None = None) -> nn.Module:
        """The head of a task; of the only one, unless named."""
        return self.heads[list(self.spec.heads).index(self.spec.head(task)[0])]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> float[N, 3, H, W], of mean 0 and deviation 1 over the data set."""
        pixels = images.to(self.mean.device).permute(0, 3, 1, 2).float()
        return (pixels - self.mean) / self.std

    def feature_map(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> the last feature map, float[N, C, h, w]."""
        x = self.normalise(images)
        if not self.spec.module:  # faster, but a user's forward may take views that it forbids
            x = x.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.stages(x)
        return features

    def classify(self, features: Tensor, task: str | None = None) -> Tensor:
        """A feature map [N, C, h, w] -> a task's logits."""
        return self.kind(task).logits(self.head(task), Features.of(features))

    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        return self.classify(self.feature_map(images), task)

    def network(self, task: str | None = None) -> nn.Module:
        """A task's part without the normalisation, for export: float[N, 3, H, W] -> logits."""
        stages = self.stages
        if isinstance(stages, FeatureLayer):
            stages = flattened(stages, self.spec.height, self.spec.width)
        return nn.Sequential(stages, self.kind(task).tail(self.head(task)))


def _channels(stages: nn.Module, spec: StudentSpec) -> int:
    """How many channels the feature map has, found by running it once. Raises UsageError."""
    size = f"{spec.height}x{spec.width}"
    what = spec.module or spec.architecture
    was_training = stages.training
    example = torch.zeros(2, 3, spec.height, spec.width)
    features = run_once(stages.eval(), lambda net: net(example), what)
    stages.train(was_training)
    where = f"layer {spec.feature_layer!r} of {what}" if spec.feature_layer else what
    if not isinstance(features, Tensor):
        raise UsageError(
            f"the student's feature map, {where}, is a {type(features).__name__} and must be one "
            "tensor [N, C, h, w]; name another student.feature_layer"
        )
    shape = tuple(features.shape)
    if len(shape) != 4 or shape[0] != 2:
        raise UsageError(
            f"the student's feature map, {where}, has the shape {list(shape)} for two images and "
            "must be [N, C, h, w]; name a layer before the pooling as student.feature_layer"
        )
    if shape[2] * shape[3] < 2:
        raise UsageError(
            f"the student's feature map, {where}, is one pixel for images of {size}, and so cannot "
            "say where the student looks; take larger images or an earlier student.feature_layer"
        )
    return int(shape[1])


def grad_cam(
    student: Student, images: NDArray[np.uint8], task: str | None = None
) -> NDArray[np.float32]:
    """Where the student looks for a task: images [N, H, W, 3] -> maps [N, h, w] in [0, 1].

    Grad-CAM (Selvaraju et al., 2017) at the last feature map A of the net's own answer y, which is the
    kind's `target` (the top-1 logit of a single-label task): relu(sum_c mean_u(dy/dA_c(u)) A_c), scaled
    to [0, 1] per image; a flat map becomes zeros.
    """
    kind, head = student.kind(task), student.head(task)
    was_training = student.training
    student.eval()
    maps = []
    for batch in _batches(images):
        with torch.no_grad():
            features = student.feature_map(batch)
        features = features.detach().requires_grad_()
        top = kind.target(kind.logits(head, Features.of(features)))
        (gradient,) = torch.autograd.grad(top.sum(), features)
        alpha = gradient.mean((2, 3), keepdim=True)
        maps.append(scale_maps(torch.relu((alpha * features.detach()).sum(1))))
    student.train(was_training)
    result: NDArray[np.float32] = torch.cat(maps).cpu().numpy()
    return result


def scale_maps(maps: Tensor) -> Tensor:
    """maps [N, h, w] -> the same scaled to [0, 1] per image; a flat one becomes zeros."""
    least = maps.amin((1, 2), keepdim=True)
    spread = maps.amax((1, 2), keepdim=True) - least
    return torch.where(spread > 0, (maps - least) / spread.clamp_min(1e-30), 0.0)


@torch.no_grad()
def predict(
    student: Student, images: NDArray[np.uint8], task: str | None = None
) -> NDArray[np.float32]:
    """A task's logits of images uint8[N, H, W, 3], with batch norm as in deployment."""
    was_training = student.training
    student.eval()
    logits = torch.cat([student(batch, task) for batch in _batches(images)])
    student.train(was_training)
    result: NDArray[np.float32] = logits.cpu().numpy()
    return result


@torch.no_grad()
def pooled_features(student: Student, images: NDArray[np.uint8]) -> Tensor:
    """What a linear head sees of images uint8[N, H, W, 3]: float[N, features]."""
    was_training = student.training
    student.eval()
    pooled = torch.cat([student.feature_map(batch).mean((2, 3)) for batch in _batches(images)])
    student.train(was_training)
    return pooled.cpu()


@torch.no_grad()
def features_of(student: Student, images: NDArray[np.uint8]) -> Features:
    """What every head sees of images uint8[N, H, W, 3]."""
    was_training = student.training
    student.eval()
    found = [Features.of(student.feature_map(batch)) for batch in _batches(images)]
    student.train(was_training)
    return Features(
        torch.cat([f.map for f in found]).cpu(), torch.cat([f.pooled for f in found]).cpu()
    )


def _batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        yield torch.from_numpy(images[start : start + _BATCH])


def accuracy(student: Student, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """The share of images whose top-1 class is their label."""
    return float((predict(student, images).argmax(axis=1) == labels).mean())


@torch.no_grad()
def measure(
    student: Student, labelled: LabelledImages, task: str | None = None
) -> dict[str, float]:
    """The task's metrics on a labelled set, by name, the kind's first one first."""
    was_training = student.training
    student.eval()
    kind = student.kind(task)
    # Logits of a dense task are as many as pixels times classes: only what the metric needs is kept.
    kept: list[NDArray[Any]] = [
        kind.kept(student(batch, task).cpu().numpy()) for batch in _batches(labelled.images)
    ]
    student.train(was_training)
    return dict(kind.measure(np.concatenate(kept), labelled.labels))


def save_student(student: Student, path: Path) -> None:
    """Write the student so that `load_student` gives it back; never a half-written file."""
    spec = msgspec.json.encode(student.spec).decode()
    save_tensors(path, {"spec": spec, "weights": student.state_dict()})


class _FirstSpec(msgspec.Struct, frozen=True):
    """As it was written when a student had one head, single-label, and no name for it."""

    classes: tuple[str, ...]
    height: int
    width: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    architecture: Architecture = "residual"
    module: str = ""
    feature_layer: str = ""


def load_student(path: Path) -> Student:
    """The student that `save_student` wrote, in this form or the first.

    Raises UsageError if the file holds none, or one whose module cannot be imported here.
    """
    what = "a student that `fedsa train` wrote"
    state = load_tensors(path, what)
    try:
        student = _built(state["spec"], dict(state["weights"]))
    except UsageError as error:
        raise UsageError(f"{path} cannot be loaded: {error}") from error
    except (KeyError, TypeError, RuntimeError, msgspec.DecodeError) as error:
        raise UsageError(f"{path} is not {what}: {error}.") from error
    return student.eval()


def _built(spec: str, weights: dict[str, Tensor]) -> Student:
    if "heads" in msgspec.json.decode(spec, type=dict[str, Any]):
        student = Student(msgspec.json.decode(spec, type=StudentSpec))
    else:
        first = msgspec.json.decode(spec, type=_FirstSpec)
        heads = {SINGLE: HeadSpec("single-label", first.classes)}
        student = Student(
            StudentSpec(
                *(heads, first.height, first.width, first.channels, first.mean, first.std),
                *(first.architecture, first.module, first.feature_layer),
            )
        )
        weights = {re.sub(r"^head\.", "heads.0.", key): value for key, value in weights.items()}
    student.load_state_dict(weights)
    return student
