"""`fedsa export`: look at a network, make a teacher of it, and package a student."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from rich.table import Table

from coordinator.terminal import console as stderr
from coordinator.terminal import percent, plain, print_json, stdout
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.topics import check_name
from edge_teacher.keys import private_key_at

if TYPE_CHECKING:
    from export.graph import InputSpec, Kind
    from export.inspect import Inspection
    from export.manifest import Manifest

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Run = Callable[[argparse.Namespace], int]


class AddCommand(Protocol):
    """Adds a command with `--json` under `under`."""

    def __call__(
        self, name: str, run: Run, words: str, *, under: Subparsers
    ) -> argparse.ArgumentParser: ...


def add_export(commands: Subparsers, command: AddCommand) -> None:
    export = commands.add_parser("export", help="networks in, signed bundles out")
    kinds = export.add_subparsers(dest="kind", required=True, metavar="KIND")

    look = command(
        "inspect", _inspect, "what is in an ONNX file, and how to make a teacher of it", under=kinds
    )
    look.add_argument("model", type=Path, help="the ONNX file")
    _input_options(look)

    teacher = command(
        "teacher", _teacher, "a torch module or an ONNX file to a teacher bundle", under=kinds
    )
    source = teacher.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=Path, help="TOML file that describes the network")
    source.add_argument("--onnx", type=Path, help="ONNX file; what is not given is found in it")
    _input_options(teacher)
    onnx = teacher.add_argument_group("with --onnx")
    onnx.add_argument("--name", help="of the teacher (default: the file's)")
    onnx.add_argument(
        "--tap",
        action="append",
        metavar="NAME=TENSOR",
        help="a feature map that may be asked for; the last one is where saliency is taken",
    )
    onnx.add_argument("--logits", help="tensor of class scores (default: found)")
    onnx.add_argument(
        "--kind",
        choices=("gradcam", "input_gradient", "gradient_times_input", "eigencam"),
        dest="saliency",
        help="of saliency (default: gradcam)",
    )
    onnx.add_argument("--class", type=int, dest="class_index", help="explained (default: top-1)")
    onnx.add_argument(
        "--reduction",
        choices=("top1", "mean", "best_path", "max"),
        help="of a dense head to one number per image (default: by the logits' rank)",
    )
    onnx.add_argument("--class-axis", type=int, help="of the scores (default: by their shape)")
    onnx.add_argument("--publish-logits", action="store_true", help="let coordinators ask for them")
    teacher.add_argument(
        "--photographs", type=Path, help="images to check on, like the ones it will be asked about"
    )

    student = command(
        "student", _student, "a trained student to a bundle with INT8 graphs", under=kinds
    )
    student.add_argument("--student", type=Path, required=True, help="student.pt of a run")
    student.add_argument("--task", required=True)
    student.add_argument("--calibration", type=Path, required=True, help="images like the devices'")
    student.add_argument("--holdout", type=Path, help="labelled images to measure the accuracy on")
    student.add_argument(
        "--largest-drop",
        type=float,
        default=0.02,
        help="of accuracy on the holdout by quantising, as a fraction; more is refused",
    )
    student.add_argument(
        "--student-version", type=_version, help="default: the time, yyyymmddhhmmss"
    )
    for each in (teacher, student):
        signing_key(each)
        each.add_argument("--out", type=Path, required=True, help="the bundle to write (.fedsa)")


def signing_key(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--signing-key",
        type=Path,
        required=True,
        help="private key that signs it (made if missing)",
    )


def _input_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "the ONNX file's input", "what the file cannot say: (pixel * scale - mean) / std"
    )
    group.add_argument(
        "--size", type=_size, metavar="HxW", help="default: the file's, else 224x224"
    )
    group.add_argument("--mean", type=_numbers, metavar="R,G,B", help="default: 0")
    group.add_argument("--std", type=_numbers, metavar="R,G,B", help="default: 1")
    group.add_argument("--scale", type=float, help="default: 1/255, or 1 for a uint8 input")
    group.add_argument("--layout", choices=("NCHW", "NHWC"), help="default: by the file's shape")
    group.add_argument("--channels", choices=("RGB", "BGR", "grey"), help="default: RGB or grey")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _version(text: str) -> int:
    version = int(text)
    if version < 1:
        raise argparse.ArgumentTypeError(f"{version} is no version: take 1 or more")
    return version


def _inspect(options: argparse.Namespace) -> int:
    from export.inspect import render

    found = _look(options.model, options)
    if options.json:
        print_json(plain(found))
    else:
        stdout.print(render(found))
    return 0


def _look(path: Path, options: argparse.Namespace) -> Inspection:
    from export.inspect import inspect

    # Told nothing, `inspect` finds out more than a guess: where the size is free, the first that runs.
    return inspect(path, _spec_of_file(path, options) if _given(options) else None)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What was said about the file's input."""
    names = ("size", "mean", "std", "scale", "layout", "channels")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _spec_of_file(path: Path, options: argparse.Namespace) -> InputSpec:
    """What was given over what the file says."""
    from export.inspect import guess_spec, load

    return msgspec.structs.replace(guess_spec(load(path)), **_given(options))


def _teacher(options: argparse.Namespace) -> int:
    from coordinator.data import read_photographs
    from export.manifest import read_manifest
    from export.teacher import CHECKED_IMAGES, export_teacher

    if options.manifest:
        _refuse_flags(options)
        manifest, folder = read_manifest(options.manifest), options.manifest.parent
    else:
        manifest, folder = _manifest_of_file(options), options.onnx.parent
    photographs = None
    if options.photographs:
        photographs = read_photographs(options.photographs, manifest.input.size, CHECKED_IMAGES)
    key = private_key_at(options.signing_key)
    with stderr.status(f"Compiling {manifest.name} and holding it against float64 …"):
        bundle = export_teacher(manifest, folder, options.out, key, photographs)
    report = msgspec.json.decode(bundle.file("report.json"))
    if options.json:
        print_json({"bundle": str(options.out), "sha256": bundle.digest, "report": report})
        return 0
    for warning in report["warnings"]:
        stderr.print(f"warning: {warning}")
    stdout.print(f"{options.out}: {_summary(report)}; signed by {bundle.signed_by}")
    return 0


def _summary(report: Any) -> str:
    parts = [f"{report['parameters']:,} parameters, {report['kind']}"]
    if report["derivative"]:
        error, judge = report["derivative"]["gradient_error"], report["derivative"]["judge"]
        parts.append(f"gradient within {error:.1g} of {judge}")
    if report["saliency_error"] is not None:
        parts.append(f"maps within {report['saliency_error']:.1g}")
    if report["half"] and report["half"]["worst_cosine"] is not None:
        parts.append(f"half precision agrees to {report['half']['worst_cosine']:.4f}")
    parts.append(f"TensorRT: {report['tensorrt']['detail']}")
    return "; ".join(parts)


_ONNX_ONLY = {
    **{name: f"--{name}" for name in ("size", "mean", "std", "scale", "layout", "channels")},
    **{name: f"--{name}" for name in ("name", "tap", "logits", "reduction")},
    "class_axis": "--class-axis",
    **{"saliency": "--kind", "class_index": "--class", "publish_logits": "--publish-logits"},
}


def _refuse_flags(options: argparse.Namespace) -> None:
    given = [
        flag for name, flag in _ONNX_ONLY.items() if getattr(options, name) not in (None, False)
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)} would not be used: with --manifest the manifest says it; write it there"
        )


def _manifest_of_file(options: argparse.Namespace) -> Manifest:
    """The flags as a manifest; the tap, where none is given, is the one `inspect` suggests."""
    from export.graph import Target
    from export.manifest import Manifest

    kind: Kind = options.saliency or "gradcam"
    found = None
    if not options.tap:
        found = _look(options.onnx, options)
        if kind == "gradcam" and found.suggested_tap is None:
            raise UsageError(
                f"{options.onnx}: no Grad-CAM: {found.problem}. `fedsa export inspect` lists the tensors "
                "that can be tapped with --tap; --kind eigencam needs no derivative"
            )
        if not found.taps:
            raise UsageError(
                f"{options.onnx} has no tensor that could be tapped; name one with --tap"
            )
        taps = {"last": found.suggested_tap or found.taps[-1].tensor}
        stderr.print(f"Taking the tap {taps['last']!r}; `fedsa export inspect` shows the others")
    else:
        taps = dict(_tap(text) for text in options.tap)
    try:
        return Manifest(
            name=options.name or options.onnx.stem,
            onnx=options.onnx.name,
            input=found.assumed if found else _spec_of_file(options.onnx, options),
            taps=taps,
            logits=options.logits or "",
            kind=kind,
            target=Target(
                class_index=options.class_index,
                reduction=options.reduction,
                class_axis=options.class_axis,
            ),
            publish_logits=options.publish_logits,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _tap(text: str) -> tuple[str, str]:
    name, equals, tensor = text.partition("=")
    if not (name and equals and tensor):
        raise UsageError(f"--tap {text!r} is no NAME=TENSOR")
    return name, tensor


def _student(options: argparse.Namespace) -> int:
    from coordinator.data import read_labelled, read_unlabelled
    from coordinator.packaging import next_version, package_student
    from coordinator.report import metric_name
    from coordinator.student import load_student
    from edge_teacher.files import write_atomically

    student = load_student(options.student)
    # Of several heads the one of that name; a single one goes by any name on the devices.
    head = options.task if len(student.spec.heads) > 1 else None
    kind = student.kind(head).name
    packaged = package_student(
        student,
        check_name(options.task),
        options.student_version or next_version(),
        read_unlabelled(options.calibration),
        read_labelled(options.holdout, kind) if options.holdout else None,
        private_key_at(options.signing_key),
        largest_drop=options.largest_drop,
        head=head,
    )
    write_atomically(options.out, packaged.bundle)
    if options.json:
        print_json({"bundle": str(options.out), "report": plain(packaged.report)})
        return 0
    table = Table("graph", "bytes", metric_name(packaged.report.metric), "agrees with FP32")
    for name, file in packaged.report.files.items():
        table.add_row(name, f"{file.bytes:,}", percent(file.accuracy), percent(file.agreement))
    stdout.print(table)
    stdout.print(f"{options.out}: version {packaged.card.version} of {packaged.card.task}")
    return 0
