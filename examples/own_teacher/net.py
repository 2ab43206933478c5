"""An owner's network, as small as it can be: trained here in seconds, so that there are weights.

python examples/own_teacher/net.py        # writes weights.pt and net.onnx beside this file
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent


def tiny(classes: int) -> nn.Module:
    """What teacher.toml names: returns the module, without weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
    )


def main() -> None:
    from coordinator.data import read_labelled
    from export.torch_to_onnx import torch_to_onnx

    torch.manual_seed(0)
    data = read_labelled(HERE.parent / "data" / "cifar10-mini.tar.xz" / "probe")
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255 - 0.5
    labels = torch.from_numpy(data.labels)
    net = tiny(len(data.classes))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.save(net.state_dict(), HERE / "weights.pt")
    onnx.save(torch_to_onnx(net.eval(), (3, 32, 32), ["logits"]), HERE / "net.onnx")
    print(f"trained on {len(images)} images to a loss of {loss.item():.2f}")


if __name__ == "__main__":
    main()
