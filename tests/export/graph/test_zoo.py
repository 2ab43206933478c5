"""Kinds of network, random and trained: gradients and maps against torch's float64 autograd, per image."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph import InputSpec, Target, build_teacher_graph, prepare
from export.graph.emit import Ops
from export.graph.gradient import gradients
from export.graph.network import Network, session
from export.graph.target import find_logits, seed
from tests.export.graph.kinks import keeping_away
from tests.export.graph.zoo import SIZE, ZOO, dynamo, make, torchscript

IMAGES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = InputSpec(size=SIZE, mean=MEAN, std=STD)
DENSE = {"unet": "mean", "fpn": "best_path"}


@cache
def exported(name: str, trained: bool) -> tuple[nn.Module, onnx.ModelProto]:
    net = make(name, trained=trained)
    return net, torchscript(net)


@cache
def images(name: str, trained: bool = True) -> np.ndarray:
    """Noise on which the module and its file take the same branches; see `kinks`."""
    _, model = exported(name, trained)
    noise = np.random.default_rng(5).integers(0, 256, (32, *SIZE, 3), dtype=np.uint8)
    return keeping_away(prepare(model, SPEC), noise, IMAGES, SPEC)


def network_input(name: str, trained: bool = True) -> Tensor:
    x = torch.from_numpy(images(name, trained)).permute(0, 3, 1, 2).double() / 255
    return (x - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / torch.tensor(STD).double().view(
        1, 3, 1, 1
    )


def scalar(name: str, y: Tensor) -> Tensor:
    """The documented reduction, written again in torch."""
    match DENSE.get(name):
        case "mean":
            means = y.mean((2, 3))
            return means.gather(1, means.argmax(1, keepdim=True)).sum()
        case "best_path":
            return y.max(2).values.mean(1).sum()
        case _:
            return y.max(1).values.sum()


def judge(name: str, net: nn.Module, trained: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input gradient, tap, tap gradient, tap as float32 saw it) by float64 autograd."""
    twin = copy.deepcopy(net).double()
    kept: list[Tensor] = []
    twin.tap.register_forward_hook(
        lambda module, args, out: (out.retain_grad(), kept.append(out))[0]
    )
    x = network_input(name, trained).requires_grad_(True)
    scalar(name, twin(x)).backward()
    (tap,) = kept
    assert x.grad is not None
    assert tap.grad is not None
    return x.grad, tap.detach(), tap.grad


def tensor_like(network: Network, x: np.ndarray, activation: np.ndarray) -> str:
    """The tensor of the ONNX network that holds this activation."""
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    names = [n for node in network.nodes for n in node.output if n in network.values]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    for name, value in zip(names, session(model).run(names, {network.input_name: x}), strict=True):
        if value.shape == activation.shape and np.allclose(value, activation, atol=1e-4):
            return name
    raise AssertionError("no tensor of the network is the tap")


def per_image(got: np.ndarray, expected: np.ndarray) -> float:
    off = np.linalg.norm((got - expected).reshape(len(got), -1), axis=1)
    return float(np.max(off / np.linalg.norm(expected.reshape(len(got), -1), axis=1)))


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("name", ZOO)
def test_gradients(name: str, trained: bool) -> None:
    net, model = exported(name, trained)
    by_input, tap, by_tap = judge(name, net, trained)
    network = prepare(model, SPEC)
    x = network_input(name, trained).float().numpy()
    tapped = tensor_like(network, x, tap.numpy())
    scores = find_logits(network, [info.name for info in model.graph.output])
    ops = Ops("g")
    wanted = [network.input_name, tapped]
    found = gradients(network, ops, {scores: seed(network, ops, scores, Target())}, wanted)
    outputs = [ops.expand(found[tensor], network.value(tensor)) for tensor in wanted]
    graph = helper.make_graph(
        [*network.nodes, *ops.nodes],
        "gradients",
        network.model.graph.input,
        [helper.make_tensor_value_info(value.name, TensorProto.FLOAT, None) for value in outputs],
        [*network.model.graph.initializer, *ops.initializers.values()],
    )
    derivative = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    got_input, got_tap = session(derivative).run(None, {network.input_name: x})
    assert per_image(got_tap, by_tap.numpy()) <= 1e-5
    assert per_image(got_input, by_input.numpy()) <= 1e-5


def pixels(tap: Tensor) -> Tensor:
    """Maps or tokens with a class token as [N, C, h, w], which is how every teacher gives them."""
    if tap.dim() == 3:
        side = int((tap.shape[1] - 1) ** 0.5)
        return tap[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    channels_last = tap.shape[1] == tap.shape[2] != tap.shape[3]
    return tap.permute(0, 3, 1, 2) if channels_last else tap


def cam(tap: Tensor, gradient: Tensor) -> np.ndarray:
    """Grad-CAM as docs/saliency.md defines it."""
    tap, gradient = pixels(tap), pixels(gradient)
    maps = (gradient.mean((2, 3), keepdim=True) * tap).sum(1).relu()
    return unit(maps)


def unit(maps: Tensor) -> np.ndarray:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / torch.where(high > low, high - low, 1.0)).numpy()


@pytest.mark.parametrize("name", ZOO)
def test_maps_of_the_teacher_graph(name: str) -> None:
    """uint8 images in, maps out: Grad-CAM, input gradient and gradient times input; batch 1, 2, 3 and 17."""
    net, model = exported(name, True)
    by_input, tap, by_tap = judge(name, net)
    x = network_input(name)
    tapped = tensor_like(prepare(model, SPEC), x.float().numpy(), tap.numpy())
    expected = {
        "gradcam": cam(tap, by_tap),
        "input_gradient": unit(by_input.abs().amax(1)),
        "gradient_times_input": unit((by_input * x).sum(1).abs()),
    }
    for kind, maps in expected.items():
        teacher = build_teacher_graph(
            model, SPEC, taps={"last": tapped}, kind=kind, publish_logits=True
        )
        onnx.checker.check_model(teacher, full_check=True)
        runner = session(teacher)
        features, saliency, _ = runner.run(None, {"images": images(name)})
        assert np.abs(saliency - maps).max() < 1e-4
        assert np.allclose(features, pixels(tap).numpy(), atol=1e-4)
        many = np.concatenate([images(name)] * 6)
        for batch in (1, 2, 17):
            (alone,) = runner.run(["saliency"], {"images": many[:batch]})
            np.testing.assert_allclose(alone, many_maps(saliency, batch), atol=1e-4)


def many_maps(saliency: np.ndarray, batch: int) -> np.ndarray:
    return np.concatenate([saliency] * 6)[:batch]


@pytest.mark.parametrize("name", ["vit"])
def test_the_dynamo_exporter_gives_the_same_maps(name: str) -> None:
    net, older = exported(name, True)
    _, tap, _ = judge(name, net)
    x = network_input(name).float().numpy()
    maps = []
    for model in (older, dynamo(net)):
        tapped = tensor_like(prepare(model, SPEC), x, tap.numpy())
        teacher = build_teacher_graph(model, SPEC, taps={"last": tapped})
        maps.append(session(teacher).run(["saliency"], {"images": images(name)})[0])
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4)


def test_images_of_another_size_are_resized_as_torch_does() -> None:
    net, model = exported("residual", False)
    other = np.random.default_rng(6).integers(0, 256, (2, 45, 28, 3), dtype=np.uint8)
    teacher = build_teacher_graph(model, SPEC, taps={}, kind="input_gradient", publish_logits=True)
    (got,) = session(teacher).run(["logits"], {"images": other})
    x = torch.from_numpy(other).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, SIZE, mode="bilinear", align_corners=False) / 255
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    np.testing.assert_allclose(got, net(x).detach().numpy(), atol=1e-4)
