"""The five networks `benchmarks.saliency` times: of the size that runs on a small device, input 64 x 64."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = (64, 64)
CLASSES = 100


def conv(
    i: int, o: int, k: int = 3, s: int = 1, act: nn.Module | None = None, g: int = 1
) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, nn.ReLU(inplace=False) if act is None else act)


class Classifier(nn.Module):
    """`tap`, global average, one linear layer."""

    def __init__(self, *stages: nn.Module, channels: int) -> None:
        super().__init__()
        self.tap, self.head = nn.Sequential(*stages), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.tap(x), 1).flatten(1))


class Residual(nn.Module):
    def __init__(self, i: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(i, o, 3, s), conv(o, o, act=nn.Identity()))
        self.skip = nn.Identity() if s == 1 and i == o else conv(i, o, 1, s, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Inverted(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze and excite, project."""

    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        h = 4 * i
        self.expand, self.depthwise = (
            conv(i, h, 1, act=nn.Hardswish()),
            conv(h, h, 3, s, nn.Hardswish(), h),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(h, i, 1),
            nn.ReLU(),
            nn.Conv2d(i, h, 1),
            nn.Hardsigmoid(),
        )
        self.project, self.same = conv(h, o, 1, act=nn.Identity()), s == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.same else y


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(n, t, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, d: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, d, 8, 8), nn.Parameter(torch.randn(1, 1, d))
        self.position = nn.Parameter(torch.randn(1, 65, d) * 0.1)
        self.blocks = nn.ModuleList(Block(d, 4) for _ in range(depth))
        self.tap = self.blocks[-1].norm1
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])


class UNet(nn.Module):
    """Segmentation: logits [N, K, 64, 64], explained by the class that is largest on average."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 24), nn.Sequential(nn.MaxPool2d(2), conv(24, 48))
        self.tap = nn.Sequential(nn.MaxPool2d(2), conv(48, 96), conv(96, 96))
        self.d, self.e, self.head = conv(144, 48), conv(72, 24), nn.Conv2d(24, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        y = F.interpolate(self.tap(b), scale_factor=2.0, mode="bilinear", align_corners=False)
        y = F.interpolate(
            self.d(torch.cat([y, b], 1)), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        return self.head(self.e(torch.cat([y, a], 1)))


def resnet() -> nn.Module:
    return Classifier(
        conv(3, 24),
        Residual(24, 24),
        Residual(24, 48, 2),
        Residual(48, 96, 2),
        Residual(96, 160, 2),
        channels=160,
    )


def mobilenet() -> nn.Module:
    act = nn.Hardswish()
    return Classifier(
        conv(3, 16, 3, 2, act), Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1),
        Inverted(24, 40, 2), Inverted(40, 40, 1), conv(40, 160, 1, act=act), channels=160,
    )  # fmt: skip


def vgg() -> nn.Module:
    pool = nn.MaxPool2d(2)
    return Classifier(
        conv(3, 24),
        pool,
        conv(24, 48),
        pool,
        conv(48, 96),
        conv(96, 96),
        pool,
        conv(96, 160),
        channels=160,
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": mobilenet,
    "resnet": resnet,
    "segmentation": UNet,
    "vgg": vgg,
    "vit": ViT,
}


def export_onnx(net: nn.Module) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        net, (torch.randn(2, 3, *SIZE),), buffer, dynamo=False, opset_version=17,
        input_names=["x"], output_names=["scores"], dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
    )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())
