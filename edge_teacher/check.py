"""`edge-teacher check`: what this device has, what each possible choice gives, and which is picked."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_teacher import bundle as bundles
from edge_teacher.bundle import Bundle, StudentCard
from edge_teacher.contract.messages import RuntimeInfo
from edge_teacher.keys import read_public
from edge_teacher.memory import total_bytes
from edge_teacher.runtime import Model, open_session
from edge_teacher.runtime.bundled import teacher_model
from edge_teacher.runtime.cuda import Gpu
from edge_teacher.runtime.machine import Machine, find_machine
from edge_teacher.runtime.trial import BATCHES, Trial
from edge_teacher.slots.canary import Canary

BOARD = Path("/proc/device-tree/model")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to execute a graph with."""

    board: str
    """As the device tree names it; empty where there is none."""
    architecture: str
    cores: int
    memory_bytes: int
    """Of the whole machine; 0 where /proc does not say."""
    python: str
    gpu: Gpu | None
    tensorrt: str
    """Module and version; empty: `why_not` says why it is not there."""
    onnxruntime: str
    providers: tuple[str, ...]
    """Of ONNX Runtime, as it was built: whether they work is seen from the choices."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `edge-teacher check` found; `--json` prints it as it is."""

    bundle: str
    sha256: str
    images: int
    """On which the choices were compared."""
    own_probe: bool
    """Whether those are the bundle's own, or generated ones."""
    device: Device
    choices: tuple[Trial, ...]
    why_not: dict[str, str]
    """What there is none of here, or was not picked, and why."""
    runtime: RuntimeInfo
    """What an agent here would say in its card."""


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], cores: Callable[[str], int]
) -> None:
    """`cores`: reads a number of them."""
    check = commands.add_parser(
        "check", help="try a bundle on every runtime of this device and say which would be picked"
    )
    check.add_argument(
        "--bundle", type=Path, required=True, help="a teacher's or student's bundle (.fedsa)"
    )
    check.add_argument("--owner-key", type=Path, action="append", required=True)
    check.add_argument("--threads", type=cores, default=1, help="cores for inference (default 1)")
    check.add_argument(
        "--state",
        type=Path,
        help="folder of the agent: engines built now are kept in it, and found by the agent",
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Raises UsageError for a path or key, CheckFailed for the bundle or if nothing here executes it."""
    # An engine takes minutes on a small board: that something is being done is worth a line.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    bundle = bundles.read(options.bundle, [read_public(path) for path in options.owner_key])
    report = check(
        bundle,
        str(options.bundle),
        threads=options.threads,
        engines=None if options.state is None else options.state / "engines",
    )
    sys.stdout.write(as_json(report) if options.json else text(report))
    return 0


def check(bundle: Bundle, name: str, *, threads: int, engines: Path | None) -> Report:
    """Try everything. Raises CheckFailed if nothing on this device executes the bundle's graph."""
    model = _model(bundle)
    machine = find_machine()
    live = open_session(model, threads=threads, engines=engines, wait=True, find=lambda: machine)
    try:
        return Report(
            bundle=name,
            sha256=bundle.digest,
            images=len(model.images()),
            own_probe=model.probe is not None,
            device=_device(machine),
            choices=live.trials,
            why_not=dict(live.why_not),
            runtime=live.info,
        )
    finally:
        live.close()


def text(report: Report) -> str:
    """For people: the device, one line for each choice, the pick, and a line for each thing not used."""
    device = report.device
    about = [device.board, device.architecture, f"{device.cores} cores", _size(device.memory_bytes)]
    lines = [
        f"this device   {', '.join(part for part in about if part)}, Python {device.python}",
        f"GPU           {_gpu(device.gpu)}",
        f"TensorRT      {device.tensorrt or 'none'}",
        f"ONNX Runtime  {device.onnxruntime or 'none'} ({', '.join(device.providers) or 'no provider'})",
        f"compared on   {report.images} "
        + ("images of the bundle" if report.own_probe else "generated images"),
        "",
    ]
    head = ("", "choice", "load s", "build s", *(f"ms/image, {n}" for n in BATCHES), "MB", "off by")
    rows = [head, *(_row(trial) for trial in report.choices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    for trial in report.choices:
        if trial.state == "picked":
            lines.append(f"picked: {trial.label}: {trial.reason}")
        lines += [f"note: {trial.label}: {note}" for note in trial.notes]
    lines += [f"not used: {label}: {reason}" for label, reason in report.why_not.items()]
    return "\n".join(lines) + "\n"


def _model(bundle: Bundle) -> Model:
    if isinstance(bundle.card, StudentCard):
        return Canary(bundle, bundle.card).model(bundle)
    return teacher_model(bundle)


def _device(machine: Machine) -> Device:
    ort, trt = machine.onnxruntime, machine.tensorrt
    try:
        board = BOARD.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        board = ""
    return Device(
        board=board,
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=total_bytes() or 0,
        python=platform.python_version(),
        gpu=None if machine.cuda is None else machine.cuda.gpu,
        tensorrt="" if trt is None else f"{trt.__name__} {trt.__version__}",
        onnxruntime="" if ort is None else ort.__version__,
        providers=() if ort is None else tuple(ort.get_available_providers()),
    )


def _row(trial: Trial) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    times = trial.ms_per_image or (None,) * len(BATCHES)
    memory = None if trial.memory_bytes is None else trial.memory_bytes / 1e6
    off = "-" if trial.largest_difference is None else f"{trial.largest_difference:.1e}"
    return (
        {"picked": "*", "usable": " ", "refused": "x"}[trial.state],
        trial.label,
        number(trial.load_s, 2),
        number(trial.build_s, 1),
        *(number(value, 3) for value in times),
        number(memory, 0),
        off,
    )


def _gpu(gpu: Gpu | None) -> str:
    if gpu is None:
        return "none"
    shared = ", memory shared with the CPU" if gpu.integrated else ""
    return (
        f"{gpu.name}, architecture {gpu.architecture}, {_size(gpu.memory_bytes)}{shared}, "
        f"driver for CUDA {gpu.cuda}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else ""


def as_json(report: object) -> str:
    """As `--json` and `edge-teacher info` print it."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + os.linesep
