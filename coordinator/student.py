"""The student: a small residual net that fits a device, quantises well and says where it looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coordinator.files import load_tensors, save_tensors
from edge_teacher.contract.errors import UsageError

_BATCH = 250


class StudentSpec(msgspec.Struct, frozen=True):
    """All that is needed, besides its weights, to build a student again.

    `mean` and `std` are per channel, for pixels scaled to [0, 1]; the net applies them itself.
    """

    classes: tuple[str, ...]
    height: int
    width: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of_images(
        cls, images: NDArray[np.uint8], classes: tuple[str, ...], channels: int
    ) -> StudentSpec:
        """A spec whose normalisation is that of `images`, uint8[N, H, W, 3]."""
        pixels = images.reshape(-1, 3).astype(np.float32) / 255
        r, g, b = (float(v) for v in pixels.mean(axis=0, dtype=np.float64))
        # A channel that never varies must not divide by zero.
        sr, sg, sb = (max(float(v), 1e-3) for v in pixels.std(axis=0, dtype=np.float64))
        return cls(classes, images.shape[1], images.shape[2], channels, (r, g, b), (sr, sg, sb))


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
    """`images uint8[N, H, W, 3] -> logits float[N, classes]`; normalisation is part of the net.

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
        self.head = nn.Linear(self.features, len(spec.classes))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> float[N, 3, H, W], of mean 0 and deviation 1 over the data set."""
        pixels = images.to(self.mean.device).permute(0, 3, 1, 2).float()
        return (pixels - self.mean) / self.std

    def feature_map(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> the last feature map, float[N, C, h, w]."""
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.stages(x)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """A feature map [N, C, h, w] -> logits [N, classes]: mean over pixels, one linear layer."""
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.feature_map(images))

    def network(self) -> nn.Module:
        """The same without the normalisation, for export: float[N, 3, H, W] -> logits."""
        return nn.Sequential(self.stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.head)


def grad_cam(student: Student, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Where the student looks: images [N, H, W, 3] -> maps [N, h, w] in [0, 1].

    Grad-CAM (Selvaraju et al., 2017) at the last feature map A of the net's own top-1 logit y:
    relu(sum_c mean_u(dy/dA_c(u)) A_c), scaled to [0, 1] per image; a flat map becomes zeros.
    """
    was_training = student.training
    student.eval()
    maps = []
    for batch in _batches(images):
        with torch.no_grad():
            features = student.feature_map(batch)
        features = features.detach().requires_grad_()
        top = student.classify(features).max(dim=1).values
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
def predict(student: Student, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits [N, classes] of images uint8[N, H, W, 3], with batch norm as in deployment."""
    was_training = student.training
    student.eval()
    logits = torch.cat([student(batch) for batch in _batches(images)])
    student.train(was_training)
    result: NDArray[np.float32] = logits.cpu().numpy()
    return result


@torch.no_grad()
def pooled_features(student: Student, images: NDArray[np.uint8]) -> Tensor:
    """What the student's head sees of images uint8[N, H, W, 3]: float[N, features]."""
    was_training = student.training
    student.eval()
    pooled = torch.cat([student.feature_map(batch).mean((2, 3)) for batch in _batches(images)])
    student.train(was_training)
    return pooled.cpu()


def _batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        yield torch.from_numpy(images[start : start + _BATCH])


def accuracy(student: Student, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """The share of images whose top-1 class is their label."""
    return float((predict(student, images).argmax(axis=1) == labels).mean())


def save_student(student: Student, path: Path) -> None:
    """Write the student so that `load_student` gives it back; never a half-written file."""
    spec = msgspec.json.encode(student.spec).decode()
    save_tensors(path, {"spec": spec, "weights": student.state_dict()})


def load_student(path: Path) -> Student:
    """The student that `save_student` wrote. Raises UsageError if the file holds none."""
    what = "a student that `fedsa train` wrote"
    state = load_tensors(path, what)
    try:
        student = Student(msgspec.json.decode(state["spec"], type=StudentSpec))
        student.load_state_dict(state["weights"])
    except (KeyError, TypeError, RuntimeError, msgspec.DecodeError) as error:
        raise UsageError(f"{path} is not {what}: {error}.") from error
    return student.eval()
