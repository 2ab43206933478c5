"""Small teachers and small settings: the real path, in the time a test may take."""

from __future__ import annotations

from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from edge_teacher.bundle import Bundle
from edge_teacher.keys import private_key_at
from export.manifest import read_manifest
from export.teacher import export_teacher

ROOT = Path(__file__).resolve().parent.parent

FAST = [
    *("--selection.k", "2", "--student.channels", "8", "--aggregation.rounds", "1"),
    *("--warmup.epochs", "1", "--scratch.epochs", "1", "--finetune.epochs", "1"),
    *("--aggregation.flips", "false", "--threads", "1"),
]
"""Settings with which a run learns little and takes seconds."""

_NET = """
from torch import nn

def net(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
    )
"""

_MANIFEST = """
name = "teacher-{name}"
module = "net.py:net"
arguments = {{ width = {width} }}
weights = "{name}.pt"
[input]
size = [{size}, {size}]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[taps]
last = "3"
"""


def net(width: int) -> nn.Module:
    scope: dict[str, object] = {}
    exec(_NET, scope)
    made = scope["net"](width)  # type: ignore[operator]
    assert isinstance(made, nn.Module)
    return made


def write_manifest(folder: Path, name: str, *, width: int = 8, size: int = 32) -> Path:
    """A manifest with its module and weights, which are random, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(_NET)
    torch.manual_seed(width)
    torch.save(net(width).state_dict(), folder / f"{name}.pt")
    path = folder / f"{name}.toml"
    path.write_text(_MANIFEST.format(name=name, width=width, size=size))
    return path


def export_at(manifest: Path, out: Path, key: Ed25519PrivateKey) -> Bundle:
    """The bundle of the manifest in a file."""
    return export_teacher(read_manifest(manifest), manifest.parent, out, key)


def three_teachers(folder: Path) -> Path:
    """An examples folder: three teachers of different widths and input sizes, and the real data."""
    teachers = folder / "examples" / "teachers"
    key = private_key_at(teachers / "owner.key")
    for name, width, size in (("a", 8, 32), ("b", 14, 24), ("c", 16, 40)):
        manifest = write_manifest(folder / "sources", name, width=width, size=size)
        export_at(manifest, teachers / f"teacher-{name}.fedsa", key)
    (folder / "examples" / "data").symlink_to(ROOT / "examples" / "data")
    return folder / "examples"
