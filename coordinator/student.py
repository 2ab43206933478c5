"""The student: a small residual net that fits a device, quantises well and says where it looks."""

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

from coordinator.data import SINGLE, LabelledImages
from coordinator.files import load_tensors, save_tensors
from coordinator.kinds import Features, Kind, kind_named
from edge_teacher.contract.errors import UsageError

_BATCH = 250


class HeadSpec(msgspec.Struct, frozen=True):
    """What one task's head answers."""

    kind: str
    classes: tuple[str, ...]


class StudentSpec(msgspec.Struct, frozen=True):
    """All that is needed, besides its weights, to build a student again.

    `mean` and `std` are per channel, for pixels scaled to [0, 1]; the net applies them itself.
    """

    heads: dict[str, HeadSpec]
    """By task."""
    height: int
    width: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of_images(
        cls,
        images: NDArray[np.uint8],
        heads: tuple[str, ...] | Mapping[str, HeadSpec],
        channels: int,
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
        size = images.shape[1], images.shape[2]
        return cls(dict(heads), *size, channels, (r, g, b), (sr, sg, sb))

    def head(self, task: str | None = None) -> tuple[str, HeadSpec]:
        """A task and what its head answers. Raises UsageError if there is none, or no name and several."""
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads.items()))
        if task is None or task not in self.heads:
            wanted = "no task is named" if task is None else f"it has none for {task!r}"
            raise UsageError(f"This student has heads for {', '.join(self.heads)}, and {wanted}.")
        return task, self.heads[task]


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResidualBlock(nn.Module):
    """`relu(f(x) + shortcut(x))` with two 3x3 convolutions (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Student(nn.Module):
    """One backbone, and a head for each task: `images uint8[N, H, W, 3] -> logits float[N, classes]`,
    or [N, classes, H, W] of a dense task. Normalisation is part of the net.

    Convolution, batch norm and ReLU only, so that batch norm folds away and INT8 loses little.
    The last feature map is an eighth of the image on each side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        c = spec.channels
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.stages = nn.Sequential(
            *(conv_bn(3, c, 3, stride=2), nn.ReLU()),
            ResidualBlock(c, c),
            ResidualBlock(c, 2 * c, stride=2),
            ResidualBlock(2 * c, 2 * c),
            # Width costs little on the smallest maps, and is what hints and heads read.
            ResidualBlock(2 * c, 6 * c, stride=2),
        )
        self.features = 6 * c
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
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def feature_map(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> the last feature map, float[N, C, h, w]."""
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.stages(x)
        return features

    def classify(self, features: Tensor, task: str | None = None) -> Tensor:
        """A feature map [N, C, h, w] -> a task's logits."""
        return self.kind(task).logits(self.head(task), Features.of(features))

    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        return self.classify(self.feature_map(images), task)

    def network(self, task: str | None = None) -> nn.Module:
        """A task's part without the normalisation, for export: float[N, 3, H, W] -> logits."""
        return nn.Sequential(self.stages, self.kind(task).tail(self.head(task)))


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
    result: NDArray[np.float32] = torch.cat(maps).numpy()
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
    result: NDArray[np.float32] = logits.numpy()
    return result


@torch.no_grad()
def pooled_features(student: Student, images: NDArray[np.uint8]) -> Tensor:
    """What a linear head sees of images uint8[N, H, W, 3]: float[N, features]."""
    was_training = student.training
    student.eval()
    pooled = torch.cat([student.feature_map(batch).mean((2, 3)) for batch in _batches(images)])
    student.train(was_training)
    return pooled


@torch.no_grad()
def features_of(student: Student, images: NDArray[np.uint8]) -> Features:
    """What every head sees of images uint8[N, H, W, 3]."""
    was_training = student.training
    student.eval()
    found = [Features.of(student.feature_map(batch)) for batch in _batches(images)]
    student.train(was_training)
    return Features(torch.cat([f.map for f in found]), torch.cat([f.pooled for f in found]))


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
        kind.kept(student(batch, task).numpy()) for batch in _batches(labelled.images)
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


def load_student(path: Path) -> Student:
    """The student that `save_student` wrote, in this form or the first. Raises UsageError if there is none."""
    what = "a student that `fedsa train` wrote"
    state = load_tensors(path, what)
    try:
        student = _built(state["spec"], dict(state["weights"]))
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
            StudentSpec(heads, first.height, first.width, first.channels, first.mean, first.std)
        )
        weights = {re.sub(r"^head\.", "heads.0.", key): value for key, value in weights.items()}
    student.load_state_dict(weights)
    return student
