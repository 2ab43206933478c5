"""`fedsa`: the workstation's command.

Exit codes: 0 done; 1 a check failed, or a device or the broker let the run down; 2 wrong usage or
unusable input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from coordinator.terminal import console as stderr
from edge_teacher import __version__
from edge_teacher.contract.errors import FedsaError, UsageError
from edge_teacher.rpc.address import BrokerAddress, parse_broker

INTERRUPTED = 130
stdout = Console(highlight=False)


def parser() -> argparse.ArgumentParser:
    from coordinator.config import config_keys

    top = argparse.ArgumentParser(
        prog="fedsa", description="Private teachers on edge devices teach one student."
    )
    top.add_argument("--version", action="version", version=f"fedsa {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="all of it on this machine, on real photographs")
    demo.add_argument("--broker", choices=("mosquitto", "iotcore"), help="default: what is there")
    demo.add_argument("--port", type=int, help="of the broker, on loopback (default: a free one)")
    demo.add_argument("--examples", type=Path, help="the repository's examples/")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a student from the devices on a broker")
    train.add_argument("--name", help="folder of this run; given again, the run goes on")
    train.add_argument("--task", required=True, help="the student's name on the devices")
    train.add_argument(
        "--key", type=Path, required=True, help="signs the student (made if missing)"
    )
    train.add_argument("--deploy", action="store_true", help="install the student on the teachers")
    train.add_argument("--teachers", type=int, default=1, help="wait for so many (default 1)")
    train.set_defaults(run=_train)

    for command in (demo, train):
        command.add_argument("--config", type=Path, help="TOML file of settings")
        command.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        settings = command.add_argument_group("settings", "over FEDSA_… variables, over --config")
        for name, description in config_keys().items():
            settings.add_argument(f"--{name}", metavar="VALUE", help=description)

    config = commands.add_parser("config", help="print every setting with its default, as TOML")
    config.set_defaults(run=_config)

    key = commands.add_parser("key", help="make an Ed25519 key pair, or show the one there is")
    key.add_argument("--out", type=Path, required=True, help="the private key; .pub beside it")
    key.set_defaults(run=_key)

    devices = commands.add_parser("devices", help="who is on the broker")
    _broker_options(devices)
    devices.add_argument("--wait", type=float, default=1.0, help="seconds to listen (default 1)")
    devices.add_argument("--json", action="store_true")
    devices.set_defaults(run=_devices)

    export = commands.add_parser("export", help="networks in, signed bundles out")
    kinds = export.add_subparsers(dest="kind", required=True, metavar="KIND")
    teacher = kinds.add_parser(
        "teacher", help="a torch module, by its manifest, to a teacher bundle"
    )
    teacher.add_argument("--manifest", type=Path, required=True)
    teacher.set_defaults(run=_export_teacher)
    student = kinds.add_parser("student", help="a trained student to a bundle with INT8 graphs")
    student.add_argument("--student", type=Path, required=True, help="student.pt of a run")
    student.add_argument("--task", required=True)
    student.add_argument("--calibration", type=Path, required=True, help="images like the devices'")
    student.add_argument("--holdout", type=Path, help="labelled images to measure the accuracy on")
    student.add_argument("--student-version", type=int, help="default: the time, yyyymmddhhmmss")
    student.set_defaults(run=_export_student)
    for kind in (teacher, student):
        kind.add_argument("--key", type=Path, required=True, help="signs it (made if missing)")
        kind.add_argument("--out", type=Path, required=True, help="the bundle to write (.fedsa)")
        kind.add_argument("--json", action="store_true", help="print the export's report as JSON")

    deploy = commands.add_parser("deploy", help="install a student bundle on devices")
    _broker_options(deploy)
    deploy.add_argument("--bundle", type=Path, required=True)
    deploy.add_argument(
        "--key", type=Path, required=True, help="public key the bundle is signed by"
    )
    deploy.add_argument(
        "--device", action="append", default=[], help="default: all that are online"
    )
    deploy.add_argument("--json", action="store_true")
    deploy.set_defaults(run=_deploy)

    predict = commands.add_parser("predict", help="ask a device's student about pictures")
    _broker_options(predict)
    predict.add_argument("--device", required=True)
    predict.add_argument("--task", required=True)
    predict.add_argument("--json", action="store_true")
    predict.add_argument("pictures", type=Path, nargs="+")
    predict.set_defaults(run=_predict)
    return top


def _broker_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--broker", required=True, help="mqtt://HOST:PORT or mqtts://HOST:PORT")
    command.add_argument("--ca", type=Path, help="certificate authority of the broker (mqtts)")
    command.add_argument("--certificate", type=Path, help="the coordinator's certificate (mqtts)")
    command.add_argument("--private-key", type=Path, help="the coordinator's private key (mqtts)")
    command.add_argument("--as", dest="coordinator", default="coordinator", help="coordinator's id")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with _terminable():
            return run(options)
    except FedsaError as error:
        stderr.print(f"fedsa: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        # A full disk or a forbidden folder can meet any command.
        place = f" ({error.filename})" if error.filename else ""
        stderr.print(f"fedsa: {error.strerror or error}{place}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        stderr.print("fedsa: interrupted; everything that was started has been ended", markup=False)
        return INTERRUPTED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: children are ended, nothing is left running."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ── commands; each imports what it needs, so that none waits for torch that does not use it ──


def _demo(options: argparse.Namespace) -> int:
    from coordinator.config import load_config
    from coordinator.demo import EXAMPLES, DemoOptions, demo_data, run_demo

    examples = options.examples or EXAMPLES
    settings = {**demo_data(examples), **_settings(options)}
    folder = _new_run(options.runs)
    report = run_demo(
        DemoOptions(
            config=load_config(options.config, settings),
            examples=examples,
            folder=folder,
            broker=options.broker,
            port=options.port,
        )
    )
    _finish(report, folder, options)
    return 0


def _train(options: argparse.Namespace) -> int:
    from coordinator.config import load_config
    from coordinator.connection import connect
    from coordinator.data import read_task
    from coordinator.pipeline import TaskRun, Timings, run_task
    from coordinator.terminal import TerminalProgress
    from edge_teacher.keys import private_key_at

    config = load_config(options.config, _settings(options))
    for section, key in (("broker", "url"), ("data", "probe"), ("data", "transfer")):
        if not getattr(getattr(config, section), key):
            raise UsageError(
                f"{section}.{key} is not set: name it with --{section}.{key}, or in the file "
                "given with --config"
            )
    test = Path(config.data.test) if config.data.test else None
    task = read_task(Path(config.data.probe), Path(config.data.transfer), test)
    timings = Timings()
    broker = config.broker
    address = parse_broker(
        broker.url,
        ca=_path(broker.ca),
        certificate=_path(broker.certificate),
        key=_path(broker.key),
    )
    with connect(address, name=broker.name) as connection:
        devices = connection.fleet.wait(max(1, options.teachers), timeout_s=10)
        folder = options.runs / options.name if options.name else _new_run(options.runs)
        folder.mkdir(parents=True, exist_ok=True)
        with TerminalProgress() as progress:
            report = run_task(
                TaskRun(
                    command="fedsa train",
                    task=options.task,
                    config=config,
                    data=task,
                    folder=folder,
                    cache=options.runs / "answers",
                    key=private_key_at(options.key),
                    deploy=options.deploy,
                ),
                connection,
                devices,
                progress,
                timings,
            )
    _finish(report, folder, options)
    return 0


def _config(_options: argparse.Namespace) -> int:
    from coordinator.config import example_config

    sys.stdout.write(example_config())
    return 0


def _key(options: argparse.Namespace) -> int:
    from edge_teacher.keys import key_id, private_key_at

    key = private_key_at(options.out)
    stdout.print(
        f"{options.out}: key {key_id(key.public_key())}; devices need {options.out.stem}.pub"
    )
    return 0


def _devices(options: argparse.Namespace) -> int:
    from coordinator.connection import connect

    with connect(_address(options), name=f"{options.coordinator}-devices") as connection:
        time.sleep(max(0.0, options.wait))
        found = connection.fleet.devices(online_only=False)
    if options.json:
        _print_json([{"device": d.name, **_plain(d.state), "card": _plain(d.card)} for d in found])
        return 0
    table = Table("device", "online", "teacher", "runtime", "taps", "students")
    for device in found:
        card = device.card
        students = [f"{s.task} {s.active_version or '-'} ({s.state})" for s in card.students]
        taps = [f"{n} {t.channels}×{t.height}×{t.width}" for n, t in card.teacher.taps.items()]
        table.add_row(
            device.name,
            "yes" if device.state.online else "no",
            f"{card.teacher.name} v{card.teacher.version}",
            f"{card.runtime.name} {card.runtime.version}, {card.runtime.provider}",
            ", ".join(taps),
            ", ".join(students) or "-",
        )
    stdout.print(table if found else "No device has announced itself on this broker.")
    return 0


def _export_teacher(options: argparse.Namespace) -> int:
    from edge_teacher.keys import private_key_at
    from export.teacher import export_teacher

    bundle = export_teacher(options.manifest, options.out, private_key_at(options.key))
    report = msgspec.json.decode(bundle.file("report.json"))
    if options.json:
        _print_json({"bundle": str(options.out), "sha256": bundle.digest, "report": report})
    else:
        stdout.print(
            f"{options.out}: {report['parameters']:,} parameters, signed by {bundle.signed_by}; "
            f"saliency within {report['saliency_error']:.1g} of torch in float64"
        )
    return 0


def _export_student(options: argparse.Namespace) -> int:
    from coordinator.data import read_labelled, read_unlabelled
    from coordinator.packaging import next_version, package_student
    from coordinator.student import load_student
    from edge_teacher.contract.topics import check_name
    from edge_teacher.files import write_atomically
    from edge_teacher.keys import private_key_at

    packaged = package_student(
        load_student(options.student),
        check_name(options.task),
        options.student_version or next_version(),
        read_unlabelled(options.calibration),
        read_labelled(options.holdout) if options.holdout else None,
        private_key_at(options.key),
    )
    write_atomically(options.out, packaged.bundle)
    if options.json:
        _print_json({"bundle": str(options.out), "report": _plain(packaged.report)})
        return 0
    table = Table("graph", "bytes", "accuracy", "agrees with FP32")
    for name, file in packaged.report.files.items():
        table.add_row(name, f"{file.bytes:,}", _percent(file.accuracy), _percent(file.agreement))
    stdout.print(table)
    stdout.print(f"{options.out}: version {packaged.card.version} of {packaged.card.task}")
    return 0


def _deploy(options: argparse.Namespace) -> int:
    from coordinator.connection import connect
    from coordinator.rollout import roll_out
    from edge_teacher import bundle as bundles
    from edge_teacher.bundle import StudentCard
    from edge_teacher.keys import read_public

    bundle = bundles.read(options.bundle, [read_public(options.key)])
    if not isinstance(bundle.card, StudentCard):
        raise UsageError(f"{options.bundle} holds a teacher; only students are deployed")
    with connect(_address(options), name=options.coordinator) as connection:
        online = {d.name for d in connection.fleet.wait(max(1, len(options.device)), timeout_s=10)}
        absent = sorted(set(options.device) - online)
        if absent:
            raise UsageError(
                f"not online: {', '.join(absent)}; online: {', '.join(sorted(online))}"
            )
        wanted = options.device or sorted(online)
        done = roll_out(connection.caller, wanted, bundle.card, options.bundle.read_bytes())
    if options.json:
        _print_json({device: _plain(status) for device, status in done.items()})
        return 0
    table = Table("device", "active version", "file", "canary agrees", "ms per image")
    for device, status in sorted(done.items()):
        table.add_row(
            device,
            str(status.active_version),
            status.runtime_file,
            _percent(status.canary_agreement),
            f"{status.canary_ms_per_image or 0:.2f}",
        )
    stdout.print(table)
    return 0


def _predict(options: argparse.Namespace) -> int:
    import numpy as np

    from coordinator.connection import connect
    from coordinator.data import read_picture
    from coordinator.rollout import predict

    pictures = [read_picture(path) for path in options.pictures]
    with connect(_address(options), name=options.coordinator) as connection:
        found = {d.name: d.card for d in connection.fleet.wait(1, timeout_s=10)}
        if options.device not in found:
            raise UsageError(f"{options.device} is not online; online: {', '.join(sorted(found))}")
        rows = []
        for path, picture in zip(options.pictures, pictures, strict=True):
            answer = predict(connection.caller, found[options.device], options.task, picture[None])
            odds = np.exp(answer.logits[0] - answer.logits[0].max())
            best = int(odds.argmax())
            rows.append(
                {
                    "picture": str(path),
                    "class": answer.classes[best],
                    "probability": round(float(odds[best] / odds.sum()), 4),
                    "version": answer.version,
                }
            )
    if options.json:
        _print_json(rows)
        return 0
    table = Table("picture", "class", "probability", "student version")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    stdout.print(table)
    return 0


# ── shared by the commands ───────────────────────────────────────────────────────────────────


def _address(options: argparse.Namespace) -> BrokerAddress:
    return parse_broker(
        options.broker, ca=options.ca, certificate=options.certificate, key=options.private_key
    )


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _settings(options: argparse.Namespace) -> Mapping[str, str]:
    """The configuration keys given as flags."""
    from coordinator.config import config_keys

    given = {key: getattr(options, key) for key in config_keys()}
    return {key: value for key, value in given.items() if value is not None}


def _new_run(runs: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, number = runs / stamp, 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{number}"
    return folder


def _finish(report: Any, folder: Path, options: argparse.Namespace) -> None:
    """Point runs/latest to a run that has a report, and show what came out."""
    link = options.runs / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve(), target_is_directory=True)
    link.replace(options.runs / "latest")
    if options.json:
        _print_json(_plain(report))
        return
    accuracy = report.accuracy
    table = Table("on the test set", "accuracy")
    table.add_row("from scratch, same labels", _percent(accuracy.scratch))
    table.add_row("FedSA student, FP32", _percent(accuracy.fedsa_fp32))
    table.add_row("FedSA student, INT8", _percent(accuracy.fedsa_int8))
    if accuracy.deployed:
        answers = sorted(accuracy.deployed.values())
        spread = _percent(answers[0])
        if answers[0] != answers[-1]:
            spread += f" to {_percent(answers[-1])}"
        table.add_row(f"INT8, as {len(answers)} devices answer", spread)
    stdout.print(table)
    chosen = [f"{t.id} ({t.weight:.2f})" for t in report.teachers if t.selected]
    stdout.print(f"Selected of {len(report.teachers)} teachers: {', '.join(chosen)}")
    stdout.print(f"{sum(report.seconds.values()):.0f} s; report: {folder / 'report.html'}")


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _plain(struct: Any) -> Any:
    return msgspec.to_builtins(struct)


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


if __name__ == "__main__":
    sys.exit(main())
