"""`fedsa`: the workstation's command.

Exit codes: 0 done; 1 a check failed, or a device or the broker let the run down; 2 wrong usage or
unusable input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.table import Table

from coordinator.export_commands import add_export, signing_key
from coordinator.task_flags import require_settings, task_flags
from coordinator.terminal import console as stderr
from coordinator.terminal import percent, plain, print_json, printable, stdout
from edge_teacher import __version__
from edge_teacher.contract.errors import FedsaError, UsageError
from edge_teacher.contract.topics import check_name
from edge_teacher.keys import key_id, private_key_at, public_path, read_public
from edge_teacher.rpc.address import BrokerAddress, parse_broker

# Before torch is loaded. Its threads wait for each other many times a second; one that spins while it
# waits takes the core from the one it waits for, on any machine that has something else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    from coordinator.config import config_keys

    top = argparse.ArgumentParser(
        prog="fedsa",
        description="Private teachers on edge devices teach one student.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fedsa {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        words: str,
        *,
        json: bool = True,
        under: Subparsers = commands,
    ) -> argparse.ArgumentParser:
        added = under.add_parser(name, help=words, description=words, allow_abbrev=False)
        added.set_defaults(run=run)
        if json:
            added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added

    demo = command("demo", _demo, "all of it on this machine, on real photographs")
    demo.add_argument("--broker", choices=("mosquitto", "iotcore"), help="default: what is there")
    demo.add_argument("--port", type=_port, help="of the broker, on loopback (default: a free one)")
    demo.add_argument("--examples", type=Path, help="the repository's examples/")

    train = command("train", _train, "train a student from the devices on a broker")
    train.add_argument("--name", help="folder of this run; given again, the run goes on")
    train.add_argument(
        "--task",
        help="the student's name on the devices; with [tasks] each has its own, and this names the run",
    )
    train.add_argument("--deploy", action="store_true", help="install the student on the teachers")
    train.add_argument("--teachers", type=_count, default=1, help="wait for so many (default 1)")
    train.add_argument(
        "--device",
        action="append",
        default=[],
        help="teacher to learn from (repeatable; default: all)",
    )
    signing_key(train)
    _broker_options(train, required=False)

    for each in (demo, train):
        each.add_argument("--config", type=Path, help="TOML file of settings")
        each.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
        settings = each.add_argument_group(
            "settings",
            "over FEDSA_… variables, over --config; of several tasks --tasks.NAME.probe and so on",
        )
        for key, description in config_keys().items():
            if not key.startswith("broker."):
                settings.add_argument(f"--{key}", metavar="VALUE", help=description)

    command("config", _config, "print every setting with its default, as TOML", json=False)

    pair = command("key", _key, "make an Ed25519 key pair, or show the one there is")
    pair.add_argument("--out", type=Path, required=True, help="the private key; .pub beside it")

    devices = command("devices", _devices, "who is on the broker")
    devices.add_argument("--wait", type=_seconds, default=1.0, help="seconds to listen (default 1)")
    _broker_options(devices)

    add_export(commands, command)

    deploy = command("deploy", _deploy, "install a student bundle on devices")
    deploy.add_argument("--bundle", type=Path, required=True)
    deploy.add_argument(
        "--trusted-key", type=Path, required=True, help="public key the bundle must be signed by"
    )
    deploy.add_argument(
        "--device", action="append", default=[], help="default: all that are online"
    )
    _broker_options(deploy)

    predict = command("predict", _predict, "ask a device's student about pictures")
    predict.add_argument("--device", required=True)
    predict.add_argument("--task", required=True)
    predict.add_argument("pictures", type=Path, nargs="+")
    _broker_options(predict)
    return top


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; those of a `--tasks.NAME.key`, which no parser can know beforehand, in `tasks` by key."""
    found = parser()
    options, rest = found.parse_known_args(arguments)
    options.tasks, rest = task_flags(rest, found.error) if "config" in options else ({}, rest)
    if rest:
        found.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _broker_options(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = command.add_argument_group("broker")
    group.add_argument("--broker", required=required, help="mqtt://HOST:PORT or mqtts://HOST:PORT")
    group.add_argument("--ca", help="certificate authority of the broker (mqtts)")
    group.add_argument("--certificate", help="the coordinator's certificate (mqtts)")
    group.add_argument("--private-key", help="the certificate's private key (mqtts)")
    group.add_argument(
        "--as", dest="coordinator", help="the coordinator's id (default: coordinator)"
    )


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: take 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of teachers: take 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: take 0 to 3600 seconds")
    return seconds


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with _terminable():
            return run(options)
    except FedsaError as error:
        stderr.print(f"fedsa: {printable(str(error))}", soft_wrap=True)
        return error.exit_code
    except OSError as error:
        # A full disk or a forbidden folder can meet any command.
        place = f" ({error.filename})" if error.filename else ""
        stderr.print(f"fedsa: {error.strerror or error}{place}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        stderr.print("fedsa: interrupted; everything that was started has been ended")
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
    from coordinator.demo import EXAMPLES, DemoOptions, run_demo, with_demo_data

    examples = options.examples or EXAMPLES
    config = load_config(options.config, _settings(options))
    if config.broker.url:
        stderr.print(f"The demo starts a broker of its own; {config.broker.url} is not used")
    folder = _new_run(options.runs)
    report = run_demo(
        DemoOptions(
            config=with_demo_data(config, examples),
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
    from coordinator.data import read_configured
    from coordinator.files import locked
    from coordinator.pipeline import TaskRun, Timings, run_task
    from coordinator.terminal import TerminalProgress
    from coordinator.training import require_enough

    if options.name in ("latest", "answers"):
        raise UsageError(f"{options.name!r} has a meaning in {options.runs}: choose another --name")
    folder = options.runs / check_name(options.name) if options.name else _new_run(options.runs)
    config = load_config(options.config, {**_settings(options), **_broker_settings(options)})
    require_settings(config)
    if options.task is None and not config.tasks:
        raise UsageError("there is no name for the student on the devices: give one with --task")
    name = check_name(options.task or "-".join(config.tasks))
    timings = Timings()
    with timings.of("data"):
        task = read_configured(config)
    broker = config.broker
    address = parse_broker(
        broker.url,
        ca=_path(broker.ca),
        certificate=_path(broker.certificate),
        key=_path(broker.key),
    )
    key = private_key_at(options.signing_key)
    with ExitStack() as stack:
        connection = stack.enter_context(connect(address, name=broker.name))
        devices = connection.fleet.wait(options.teachers, names=[*map(check_name, options.device)])
        if options.device:
            devices = [device for device in devices if device.name in options.device]
        require_enough(config, len(devices))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        stderr.print(f"{len(devices)} teachers: {', '.join(d.name for d in devices)}")
        stderr.print(f"This run is in {folder}; with --name {folder.name} it can be gone on with")
        run = TaskRun(
            command="fedsa train",
            task=name,
            config=config,
            data=task,
            folder=folder,
            cache=options.runs / "answers",
            key=key,
            deploy=options.deploy,
        )
        with TerminalProgress() as progress:
            report = run_task(run, connection, devices, progress, timings)
    _finish(report, folder, options)
    return 0


def _config(_options: argparse.Namespace) -> int:
    from coordinator.config import example_config

    sys.stdout.write(example_config())
    return 0


def _key(options: argparse.Namespace) -> int:
    from edge_teacher.keys import private_key_at

    key = private_key_at(options.out)
    public = public_path(options.out)
    if options.json:
        print_json(
            {"key": key_id(key.public_key()), "private": str(options.out), "public": str(public)}
        )
    else:
        stdout.print(
            f"{options.out}: key {key_id(key.public_key())}; who is to trust it needs {public}"
        )
    return 0


def _devices(options: argparse.Namespace) -> int:
    from coordinator.connection import connect

    with connect(_address(options), name=_coordinator(options)) as connection:
        time.sleep(options.wait)
        found = connection.fleet.devices(online_only=False)
    if options.json:
        print_json([{"device": d.name, **plain(d.state), "card": plain(d.card)} for d in found])
        return 0
    table = Table("device", "online", "teacher", "runtime", "taps", "students")
    for device in found:
        card = device.card
        students = [f"{s.task} {s.active_version or '-'} ({s.state})" for s in card.students]
        taps = [f"{n} {t.channels}×{t.height}×{t.width}" for n, t in card.teacher.taps.items()]
        cells = (
            device.name,
            "yes" if device.state.online else "no",
            f"{card.teacher.name} v{card.teacher.version}",
            f"{card.runtime.name} {card.runtime.version}, {card.runtime.provider}",
            ", ".join(taps),
            ", ".join(students) or "-",
        )
        table.add_row(*map(printable, cells))
    stdout.print(table if found else "No device has announced itself on this broker.")
    return 0


def _deploy(options: argparse.Namespace) -> int:
    from coordinator.connection import connect
    from coordinator.rollout import roll_out
    from edge_teacher import bundle as bundles
    from edge_teacher.bundle import StudentCard

    bundle = bundles.read(options.bundle, [read_public(options.trusted_key)])
    if not isinstance(bundle.card, StudentCard):
        raise UsageError(f"{options.bundle} holds a teacher; only students are deployed")
    with connect(_address(options), name=_coordinator(options)) as connection:
        named = list(dict.fromkeys(options.device))
        wanted = named or [d.name for d in connection.fleet.wait()]
        connection.fleet.wait(names=wanted)
        done = roll_out(connection.caller, wanted, bundle.card, options.bundle.read_bytes())
    if options.json:
        print_json({device: plain(status) for device, status in done.items()})
        return 0
    table = Table("device", "active version", "file", "canary agrees", "ms per image")
    for device, status in sorted(done.items()):
        table.add_row(
            device,
            str(status.active_version),
            status.runtime_file,
            percent(status.canary_agreement),
            f"{status.canary_ms_per_image or 0:.2f}",
        )
    stdout.print(table)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from coordinator.connection import connect
    from coordinator.image_files import read_picture
    from coordinator.reading import read_answer
    from coordinator.rollout import predict

    check_name(options.device)
    pictures = [read_picture(path) for path in options.pictures]
    with connect(_address(options), name=_coordinator(options)) as connection:
        there = connection.fleet.wait(names=[options.device])
        card = next(d.card for d in there if d.name == options.device)
        rows = []
        for path, picture in zip(options.pictures, pictures, strict=True):
            answer = predict(connection.caller, card, options.task, picture[None])
            said = read_answer(answer.logits[0], answer.classes, answer.decision)
            row = {"picture": str(path), "class": said.named, "probability": said.probability}
            rows.append(row | said.details | {"version": answer.version})
    if options.json:
        print_json(rows)
        return 0
    table = Table("picture", "class", "probability", "student version")
    for row in rows:
        cells = (row["picture"], row["class"], row["probability"], row["version"])
        table.add_row(*(printable(str(value)) for value in cells))
    stdout.print(table)
    return 0


# ── shared by the commands ───────────────────────────────────────────────────────────────────


def _address(options: argparse.Namespace) -> BrokerAddress:
    return parse_broker(
        options.broker,
        ca=_path(options.ca),
        certificate=_path(options.certificate),
        key=_path(options.private_key),
    )


def _coordinator(options: argparse.Namespace) -> str:
    return options.coordinator or "coordinator"


def _broker_settings(options: argparse.Namespace) -> Mapping[str, str]:
    """The broker's flags as the settings they go over."""
    given = {
        "broker.url": options.broker,
        "broker.ca": options.ca,
        "broker.certificate": options.certificate,
        "broker.key": options.private_key,
        "broker.name": options.coordinator,
    }
    return {key: value for key, value in given.items() if value is not None}


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _settings(options: argparse.Namespace) -> Mapping[str, str]:
    """The configuration keys given as flags."""
    from coordinator.config import config_keys

    given = {key: getattr(options, key, None) for key in config_keys()}
    of_tasks: dict[str, str] = options.tasks
    return {key: value for key, value in given.items() if value is not None} | of_tasks


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
    link.symlink_to(folder.relative_to(options.runs), target_is_directory=True)
    link.replace(options.runs / "latest")
    if options.json:
        print_json(plain(report))
        return
    accuracy = report.accuracy
    from coordinator.report import metric_name

    table = Table("on the test set", metric_name(report.metric))
    table.add_row("from scratch, same labels", percent(accuracy.scratch))
    table.add_row("FedSA student, FP32", percent(accuracy.fedsa_fp32))
    table.add_row("FedSA student, INT8", percent(accuracy.fedsa_int8))
    if accuracy.deployed:
        answers = sorted(accuracy.deployed.values())
        spread = percent(answers[0])
        if answers[0] != answers[-1]:
            spread += f" to {percent(answers[-1])}"
        table.add_row(f"INT8, as {len(answers)} devices answer", spread)
    stdout.print(table)
    chosen = [f"{t.id} ({t.weight:.2f})" for t in report.teachers if t.selected]
    stdout.print(f"Selected of {len(report.teachers)} teachers: {', '.join(chosen)}")
    stdout.print(f"{report.seconds['total']:.0f} s; report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
