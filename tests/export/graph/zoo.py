"""Twelve kinds of vision network in small: what the derivative is proved on.

Each takes [N, 3, 32, 32] and names, as `tap`, the module whose output Grad-CAM looks at.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = (32, 32)
CLASSES = 7


def conv(
    i: int, o: int, k: int = 3, s: int = 1, act: nn.Module | None = None, g: int = 1
) -> nn.Sequential:
    body = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*body, act if act is not None else nn.ReLU())


class Net(nn.Module):
    """`stages`, global average, one linear layer."""

    def __init__(self, *stages: nn.Module, channels: int) -> None:
        super().__init__()
        self.tap = nn.Sequential(*stages)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.tap(x), 1).flatten(1))


class Residual(nn.Module):
    def __init__(
        self, i: int, o: int, s: int = 1, act: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(i, o, 3, s), conv(o, o, act=nn.Identity()))
        self.skip = nn.Identity() if s == 1 and i == o else conv(i, o, 1, s, nn.Identity())
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.skip(x))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, gate: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), gate
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x)


class Inverted(nn.Module):
    def __init__(
        self, i: int, o: int, s: int, act: nn.Module, se: nn.Module | None = None, k: int = 3
    ) -> None:
        super().__init__()
        h = 3 * i
        parts = [conv(i, h, 1, act=act), conv(h, h, k, s, act, h)]
        if se is not None:
            parts.append(SqueezeExcite(h, se))
        self.body = nn.Sequential(*parts, conv(h, o, 1, act=nn.Identity()))
        self.same = s == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class Dense(nn.Module):
    def __init__(self, i: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(i + k * growth),
                nn.ReLU(),
                nn.Conv2d(i + k * growth, growth, 3, 1, 1),
            )
            for k in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Shuffle(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.body = nn.Sequential(conv(h, h, 1), conv(h, h, 3, 1, nn.Identity(), h), conv(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.body(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Inception(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.a, self.b = conv(i, 4, 1), nn.Sequential(conv(i, 4, 1), conv(4, 6, 5))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(i, 4, 1))
        self.d = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(i, 4, 1))
        self.e = nn.Sequential(
            nn.Conv2d(i, 4, (1, 7), padding=(0, 3)), nn.Conv2d(4, 4, (7, 1), padding=(3, 0))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x), self.e(x)], 1)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(torch.full((c,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(n, t, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, fused: bool = False, gelu: str = "none") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads, fused)
        self.mlp = nn.Sequential(
            nn.Linear(d, 2 * d), nn.GELU(approximate=gelu), nn.Linear(2 * d, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Class token, learnt positions; `tap` is the first norm of the last block, as pytorch-grad-cam advises."""

    def __init__(self) -> None:
        super().__init__()
        d = 24
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, d))
        self.position = nn.Parameter(torch.randn(1, 17, d) * 0.2)
        self.blocks = nn.ModuleList([Block(d, 3, fused=True), Block(d, 3, gelu="tanh")])
        self.tap = self.blocks[-1].norm1
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])


class Swin(nn.Module):
    """Windows of 4 x 4 patches, the second block shifted by two; a map [N, h, w, C] throughout."""

    def __init__(self) -> None:
        super().__init__()
        d = 16
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.blocks = nn.ModuleList([Block(d, 2), Block(d, 2)])
        self.merge = nn.Linear(4 * d, 2 * d)
        self.last, self.tap = Block(2 * d, 2), nn.LayerNorm(2 * d)
        self.head = nn.Linear(2 * d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).permute(0, 2, 3, 1)
        for i, block in enumerate(self.blocks):
            y = torch.roll(y, (-2 * i, -2 * i), (1, 2))
            n, h, w, d = y.shape
            windows = (
                y.reshape(n, h // 4, 4, w // 4, 4, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, d)
            )
            windows = block(windows).reshape(n, h // 4, w // 4, 4, 4, d)
            y = torch.roll(
                windows.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, d), (2 * i, 2 * i), (1, 2)
            )
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        y = self.merge(y)
        n, h, w, d = y.shape
        y = self.tap(self.last(y.reshape(n, h * w, d)).reshape(n, h, w, d))
        return self.head(y.mean((1, 2)))


class UNet(nn.Module):
    """Segmentation: [N, K, 32, 32] logits; a transposed convolution and a bilinear upsampling on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Sequential(nn.MaxPool2d(2), conv(8, 12))
        self.tap = nn.Sequential(nn.MaxPool2d(3, 2, 1), conv(12, 16))
        self.up1, self.d = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 8)
        self.e, self.head = conv(16, 8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        y = self.d(torch.cat([self.up1(self.tap(b)), b], 1))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.e(torch.cat([y, a], 1)))


class FPN(nn.Module):
    """A detector's head: three levels, predictions [N, anchors, 4 + K] concatenated over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3, 2)
        self.c2, self.c3, self.tap = Residual(8, 8), Residual(8, 12, 2), Residual(12, 16, 2)
        self.l2, self.l3, self.l4 = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)
        self.predict = nn.Sequential(conv(8, 8, act=nn.SiLU()), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        c2 = self.c2(self.stem(x))
        c3 = self.c3(c2)
        p4 = self.l4(self.tap(c3))
        p3 = self.l3(c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        p2 = self.l2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        return torch.cat([self.predict(p).flatten(2) for p in (p2, p3, p4)], 2).transpose(1, 2)


def efficient() -> Net:
    act = nn.SiLU()
    return Net(
        conv(3, 8, 3, 2, act), Inverted(8, 12, 2, act, nn.Sigmoid()), Inverted(12, 12, 1, act, nn.Sigmoid(), 5),
        conv(12, 24, 1, act=act), channels=24,
    )  # fmt: skip


ZOO: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Net(
        conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(8, 8), Residual(8, 16, 2), channels=16
    ),
    "vgg": lambda: Net(
        conv(3, 8), nn.MaxPool2d(2), conv(8, 12), conv(12, 12), nn.MaxPool2d(2, ceil_mode=True), conv(12, 16),
        channels=16,
    ),
    "mobilenet_v2": lambda: Net(
        conv(3, 8, 3, 2, nn.ReLU6()), Inverted(8, 8, 1, nn.ReLU6()), Inverted(8, 12, 2, nn.ReLU6()),
        conv(12, 24, 1, act=nn.ReLU6()), channels=24,
    ),
    "mobilenet_v3": lambda: Net(
        conv(3, 8, 3, 2, nn.Hardswish()), Inverted(8, 8, 1, nn.ReLU(), nn.Hardsigmoid()),
        Inverted(8, 12, 2, nn.Hardswish(), nn.Hardsigmoid(), 5), conv(12, 24, 1, act=nn.Hardswish()),
        channels=24,
    ),
    "densenet": lambda: Net(
        conv(3, 8), Dense(8, 4, 3), conv(20, 10, 1), nn.AvgPool2d(2), Dense(10, 4, 2),
        nn.BatchNorm2d(18), nn.ReLU(), channels=18,
    ),
    "shufflenet": lambda: Net(conv(3, 8, 3, 2), Shuffle(8), Shuffle(8), conv(8, 16, 1), channels=16),
    "inception": lambda: Net(conv(3, 8, 3, 2), Inception(8), Inception(22), channels=22),
    "efficientnet": efficient,
    "convnext": lambda: Net(
        nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12), ConvNeXtBlock(12), LayerNorm2d(12), nn.Conv2d(12, 16, 2, 2),
        ConvNeXtBlock(16), channels=16,
    ),
    "vit": ViT,
    "swin": Swin,
    "unet": UNet,
    "fpn": FPN,
}  # fmt: skip


def make(name: str, *, trained: bool) -> nn.Module:
    """A net with random statistics; `trained` adds 40 steps on random blobs so that weights have structure."""
    torch.manual_seed(11)
    torch.set_num_threads(1)
    net = ZOO[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if trained:
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(40):
            labels = torch.randint(0, CLASSES, (8,))
            images = 0.3 * torch.randn(8, 3, *SIZE)
            for i, label in enumerate(labels.tolist()):
                images[i, label % 3, 4 * (label // 3) :: 5 + label] += 1
            y = net(images)
            y = y if y.dim() == 2 else (y.mean((2, 3)) if y.dim() == 4 else y.mean(1))
            loss = F.cross_entropy(y, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


def torchscript(net: nn.Module, opset: int = 17) -> onnx.ModelProto:
    """The older exporter: quick, and another producer than `dynamo`."""
    buffer = io.BytesIO()
    torch.onnx.export(
        net, (torch.randn(2, 3, *SIZE),), buffer, dynamo=False, opset_version=opset,
        input_names=["input"], output_names=["scores"], dynamic_axes={"input": {0: "N"}, "scores": {0: "N"}},
    )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


def dynamo(net: nn.Module, opset: int = 18) -> onnx.ModelProto:
    batch = torch.export.Dim("N")
    program = torch.onnx.export(
        net,
        (torch.randn(2, 3, *SIZE),),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    return program.model_proto
