"""A user's own network as the student's: imported by name, cut off behind its feature layer."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from edge_teacher.contract.errors import CheckFailed, UsageError


class _Reached(Exception):
    """The feature map is there; what comes behind it is not computed."""


class FeatureLayer(nn.Module):
    """`module` up to its submodule `layer`, whose output is the feature map.

    Layers behind it are never run, so they cost nothing in training and are not in an exported graph.
    """

    def __init__(self, module: nn.Module, layer: str) -> None:
        super().__init__()
        self.module = module
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        found: list[Any] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        hook = self.module.get_submodule(self.layer).register_forward_hook(keep)
        try:
            self.module(images)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not found:
            raise UsageError(
                f"student.feature_layer {self.layer!r} is never run by its module; name a submodule "
                "that is called in forward"
            )
        reached: Tensor = found[0]
        return reached


def flattened(net: nn.Module, height: int, width: int) -> nn.Module:
    """The same net in use (not in training) as one flat graph, for what exports networks.

    What is cut off is then nowhere to be seen. torch.export follows the calls of modules itself, and
    loses its way where one of them does not return. Raises CheckFailed for a net that cannot be followed.
    """
    example = torch.zeros(2, 3, height, width)
    used = copy.deepcopy(net).to("cpu", torch.float32).eval()
    with torch.no_grad():
        # The weights are real tensors; only the images stand for any.
        trace = make_fx(used, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        try:
            return trace(example)
        except Exception as error:
            # torch.fx raises many kinds; all mean that this network has no one graph.
            from export.torch_to_onnx import why_not  # brings onnx, which only this needs

            raise CheckFailed(f"torch cannot follow the network: {why_not(error)}") from error


def imported(path: str, layer: str, height: int, width: int) -> nn.Module:
    """float[N, 3, height, width] -> the feature map, by a user's module.

    `path` is `package.module:factory`, called without arguments; `layer` names the submodule whose
    output is the map, and empty says that the module's own output is. Layers behind it are dropped.
    Raises UsageError, whose sentence says what is wrong with it.
    """
    module = _made(path)
    if not layer:
        return module
    names = [name for name, _ in module.named_modules() if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=1, cutoff=0.4)
        top = [name for name, _ in module.named_children()]
        raise UsageError(
            f"{path} has no layer {layer!r} (student.feature_layer); "
            + (f"did you mean {near[0]!r}?" if near else f"its layers are {', '.join(top)}")
        )
    net = FeatureLayer(module, layer)
    _drop_dead(net, lambda n: n(torch.zeros(2, 3, height, width)), path)
    return net


def _made(path: str) -> nn.Module:
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise UsageError(f"student.module is {path!r} and must be package.module:factory")
    try:
        factory = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except ImportError as error:
        raise UsageError(
            f"student.module {path} cannot be imported here ({error}); install its package, or name "
            "its folder in PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UsageError(f"student.module {path} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # the code is the user's, and may raise anything
        raise UsageError(f"importing {name} fails: {type(error).__name__}: {error}") from error
    try:
        made = factory()  # type: ignore[operator]  # what it is, is looked at below
    except (Exception, SystemExit) as error:  # as above
        raise UsageError(
            f"student.module {path}, called without arguments, fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"student.module {path} gives a {type(made).__name__}, and must give a torch.nn.Module"
        )
    return made


def _drop_dead(net: FeatureLayer, run: Callable[[nn.Module], Tensor], path: str) -> None:
    """Replace what is never called on the way to the feature map, in training or in use."""
    probe = copy.deepcopy(net)  # running it in training changes batch norm's statistics
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _m, _i, name=name: called.add(name))
        for name, module in probe.module.named_modules()
    ]
    run_once(probe.train(), run, path)
    run_once(probe.eval(), run, path)
    for hook in hooks:
        hook.remove()
    living = {name[:end] for name in called for end in _ends(name)}
    for name, _ in list(net.module.named_modules()):
        parent, _, child = name.rpartition(".")
        if name and name not in living and (not parent or parent in living):
            setattr(net.module.get_submodule(parent), child, nn.Identity())


def _ends(name: str) -> list[int]:
    """Where a dotted name and the names of what it lies in end."""
    return [i for i, c in enumerate(name) if c == "."] + [len(name)]


@torch.no_grad()
def run_once(net: nn.Module, run: Callable[[nn.Module], Tensor], what: str) -> Tensor:
    """What the net answers. Raises UsageError with its own reason if it does not."""
    try:
        with torch.random.fork_rng(devices=()):  # dropout must not shift anybody's random numbers
            return run(net)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # the code is the user's, and may raise anything
        raise UsageError(
            f"the student {what} cannot take two images float[2, 3, H, W] of the task's size: "
            f"{type(error).__name__}: {error}"
        ) from error
