"""Train the eight example teachers on eight disjoint groups of 20 Tiny-ImageNet classes.

    python examples/teachers/train.py --data ../shared/data/tiny_imagenet32_160.tar.xz

Teacher i learns the sorted wnids 20 i … 20 i + 19 and nothing else; its architecture, input size and
normalisation stand in teacher-<i>.toml. Each teacher trains on one thread, so run two of these side by
side on two cores (`--only 0 2 4 6` and `--only 1 3 5 7`). A finished teacher is skipped when the script
is started again. The accuracy each reached on its own 20 classes goes to checkpoints/teacher-<i>.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import tomllib
import torch
from nets import ARCHITECTURES
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent
CLASSES_PER_TEACHER = 20
BATCH = 64
SEED = 2207


def read_images(archive: Path) -> dict[str, dict[str, np.ndarray]]:
    """{split: {wnid: uint8[n, 32, 32, 3]}} for every image in the archive."""
    images: dict[str, dict[str, list[np.ndarray]]] = {"train": {}, "val": {}}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3 and parts[-3] in images:
                file = tar.extractfile(member)
                assert file is not None
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                images[parts[-3]].setdefault(parts[-2], []).append(pixels)
    return {
        split: {wnid: np.stack(found) for wnid, found in groups.items()}
        for split, groups in images.items()
    }


def labelled(groups: dict[str, np.ndarray], wnids: list[str]) -> tuple[Tensor, Tensor]:
    """float[n, 3, 32, 32] in 0-255 and int64[n], for the given classes only."""
    pixels = np.concatenate([groups[wnid] for wnid in wnids])
    labels = np.concatenate([np.full(len(groups[w]), i) for i, w in enumerate(wnids)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), torch.from_numpy(labels)


def augment(batch: Tensor) -> Tensor:
    """A random flip and a random shift of up to four pixels, per image."""
    n, _, height, width = batch.shape
    padded = F.pad(batch, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n)).tolist()
    flips = torch.rand(n).lt(0.5).tolist()
    crops = []
    for image, y, x, flip in zip(padded, top, left, flips, strict=True):
        crop = image[:, y : y + height, x : x + width]
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


def train(index: int, data: dict[str, dict[str, np.ndarray]], epochs: int) -> None:
    manifest = tomllib.loads((HERE / f"teacher-{index}.toml").read_text())
    weights = HERE / manifest["weights"]
    if weights.exists():
        print(f"teacher-{index}: already trained", flush=True)
        return
    torch.manual_seed(SEED + index)
    wnids = sorted(data["train"])[CLASSES_PER_TEACHER * index : CLASSES_PER_TEACHER * (index + 1)]
    images, labels = labelled(data["train"], wnids)
    val_images, val_labels = labelled(data["val"], wnids)
    mean = torch.tensor(manifest["input"]["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(manifest["input"]["std"]).view(1, 3, 1, 1)
    size = manifest["input"]["size"]

    def prepare(batch: Tensor) -> Tensor:
        # Exactly what the exported graph does, in the same order.
        if list(batch.shape[-2:]) != size:
            batch = F.interpolate(batch, size, mode="bilinear", align_corners=False)
        return ((batch / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    architecture = manifest["module"].split(":")[1]
    net = ARCHITECTURES[architecture](CLASSES_PER_TEACHER).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 0.15, total_steps=steps, pct_start=0.2
    )

    def accuracy() -> float:
        net.eval()
        with torch.inference_mode():
            hits = [
                (net(prepare(x)).argmax(1) == y).float()
                for x, y in zip(val_images.split(250), val_labels.split(250), strict=True)
            ]
        return float(torch.cat(hits).mean())

    started = time.monotonic()
    for epoch in range(epochs):
        net.train()
        for batch in torch.randperm(len(images)).split(BATCH):
            if len(batch) < BATCH:
                continue
            loss = F.cross_entropy(net(prepare(augment(images[batch]))), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(
            f"teacher-{index} {architecture} epoch {epoch + 1}/{epochs} loss {loss.item():.3f} "
            f"val {accuracy():.3f} {time.monotonic() - started:.0f} s",
            flush=True,
        )
    weights.parent.mkdir(exist_ok=True)
    report = {
        "teacher": f"teacher-{index}",
        "architecture": architecture,
        "wnids": wnids,
        "seed": SEED + index,
        "epochs": epochs,
        "val_accuracy": round(accuracy(), 4),
        "seconds": round(time.monotonic() - started),
    }
    weights.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    torch.save({k: v.contiguous() for k, v in net.state_dict().items()}, weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="tiny_imagenet32_160.tar.xz")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--only", type=int, nargs="*", default=list(range(8)), metavar="I")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = read_images(arguments.data)
    for index in arguments.only:
        train(index, data, arguments.epochs)


if __name__ == "__main__":
    main()
