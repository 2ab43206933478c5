"""`fedsa train`: a run in a folder, begun or gone on with, and what came out of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table

from coordinator.task_flags import require_settings
from coordinator.terminal import console as stderr
from coordinator.terminal import percent, plain, print_json, printable, stdout, teachers_of
from edge_teacher.contract.errors import Unreachable, UsageError
from edge_teacher.contract.topics import check_name
from edge_teacher.keys import private_key_at
from edge_teacher.rpc.address import parse_broker

if TYPE_CHECKING:
    from coordinator.config import DistributedConfig
    from coordinator.resume import Begun

Run = Callable[[argparse.Namespace], int]

_TAKEN = ("latest", "answers")


class AddCommand(Protocol):
    """Adds a command with `--json`."""

    def __call__(self, name: str, run: Run, words: str) -> argparse.ArgumentParser: ...


def add_train(command: AddCommand, broker_options: Callable[..., None]) -> None:
    train = command("train", _train, "train a student from the devices on a broker")
    place = train.add_mutually_exclusive_group()
    place.add_argument("--name", help="folder of this run; given again, the run goes on")
    place.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with this run, with everything it was begun with that is not given again",
    )
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
    train.add_argument(
        "--signing-key", type=Path, help="private key that signs the student (made if missing)"
    )
    broker_options(train, required=False)
    run_options(train)


def run_options(command: argparse.ArgumentParser) -> None:
    """What every command takes that trains."""
    from coordinator.settings import config_keys

    command.add_argument("--config", type=Path, help="TOML file of settings")
    command.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    settings = command.add_argument_group(
        "settings",
        "over FEDSA_… variables, over --config; of several tasks --tasks.NAME.probe and so on",
    )
    for key, description in config_keys().items():
        if not key.startswith("broker."):
            settings.add_argument(f"--{key}", metavar="VALUE", help=description)


def run_settings(options: argparse.Namespace) -> Mapping[str, str]:
    """The configuration keys given as flags."""
    from coordinator.settings import config_keys

    given = {key: getattr(options, key, None) for key in config_keys()}
    of_tasks: dict[str, str] = options.tasks
    return {key: value for key, value in given.items() if value is not None} | of_tasks


def new_run(runs: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, number = runs / stamp, 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{number}"
    return folder


def finish(report: Any, folder: Path, options: argparse.Namespace) -> None:
    """Point runs/latest to a run that has a report, and show what came out."""
    link = options.runs / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(options.runs), target_is_directory=True)
    link.replace(options.runs / "latest")
    if options.json:
        print_json(plain(report))
        return
    from coordinator.report import metric_name

    accuracy = report.accuracy
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
    stdout.print(f"Selected of {teachers_of(len(report.teachers))}: {', '.join(chosen)}")
    for one in report.lost:
        stdout.print(printable(f"Set aside: {one.teacher}, at {one.stage}: {one.why}"))
    stdout.print(f"{report.seconds['total']:.0f} s; report: {folder / 'report.html'}")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of teachers: take 1 or more")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    from coordinator.checkpoints import begun as has_checkpoint
    from coordinator.checkpoints import waited_for
    from coordinator.connection import connect
    from coordinator.data import read_configured
    from coordinator.pipeline import TaskRun, Timings, run_task, train_along
    from coordinator.ranks import joined
    from coordinator.requirements import require_enough
    from coordinator.resume import keep
    from coordinator.terminal import TerminalProgress
    from coordinator.tracking import tracked
    from edge_teacher.files import locked

    with ExitStack() as stack:
        ranks = stack.enter_context(joined(_distributed(options)))
        # The first process has the run's folder, and knows what an earlier one left there.
        folder, begun = ranks.first_does(lambda: _place(options))
        config = begun.config
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
        if ranks.first:
            private_key_at(Path(begun.signing_key))  # known to be one before anything is trained
        name = broker.name if ranks.first else f"{broker.name}-{ranks.rank}"
        connection = stack.enter_context(connect(address, name=name))

        def there() -> list[str]:
            # Who was lost may be gone for good: the run waits for the others, a while.
            wanted = waited_for(folder, begun.devices)
            try:
                found = connection.fleet.wait(options.teachers, names=wanted)
            except Unreachable:
                found = connection.fleet.devices()
                missing = sorted(set(wanted) - {device.name for device in found})
                if not has_checkpoint(folder) or not missing or len(missing) == len(wanted):
                    raise
                stderr.print(f"Missing, and the run goes on without: {', '.join(missing)}")
            names = [d.name for d in found if not begun.devices or d.name in begun.devices]
            if not has_checkpoint(folder):  # a run that is gone on with may have lost some
                require_enough(config, len(names))
            return names

        names = ranks.first_does(there)
        devices = [d for d in connection.fleet.wait(names=names) if d.name in names]
        cache = options.runs / "answers"
        if not ranks.first:
            train_along(config, task, cache, ranks, connection, devices)
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder, "command"))
        there_now = list(dict.fromkeys([*begun.devices, *names]))
        stderr.print(f"{teachers_of(len(devices))}: {', '.join(names)}")
        stderr.print(f"This run is in {folder}; with --resume {folder.name} it goes on")
        tracking = stack.enter_context(tracked(folder, folder.name, config, stderr.print))
        run = TaskRun(
            command="fedsa train",
            task=begun.task,
            config=config,
            data=task,
            folder=folder,
            cache=cache,
            key=private_key_at(Path(begun.signing_key)),
            deploy=begun.deploy,
            ranks=ranks,
            tracking=tracking,
            # A setting that is refused, mistyped say, must not be what the run goes on with.
            accepted=lambda: keep(folder, begun, there_now),
        )
        with TerminalProgress() as progress:
            report = run_task(run, connection, devices, progress, timings)
    finish(report, folder, options)
    return 0


def _distributed(options: argparse.Namespace) -> DistributedConfig:
    """How long the processes wait for each other: known before they have met."""
    from coordinator.settings import load_config

    return load_config(options.config, run_settings(options)).distributed


def _place(options: argparse.Namespace) -> tuple[Path, Begun]:
    """The run's folder, and what it is begun or gone on with. Raises UsageError."""
    from coordinator.resume import Begun, begun_with
    from coordinator.settings import load_config

    name = options.resume or options.name
    if name in _TAKEN:
        raise UsageError(f"{name!r} has a meaning in {options.runs}: choose another --name")
    folder = options.runs / check_name(name) if name else new_run(options.runs)
    flags = {**run_settings(options), **_broker_settings(options)}
    devices = list(dict.fromkeys(map(check_name, options.device)))
    signing_key = None if options.signing_key is None else str(options.signing_key)
    if options.resume:
        earlier = begun_with(folder, options.config, flags)
        begun = Begun(
            task=options.task or earlier.task,
            signing_key=signing_key or earlier.signing_key,
            deploy=options.deploy or earlier.deploy,
            devices=tuple(devices) or earlier.devices,
            config=earlier.config,
        )
    else:
        config = load_config(options.config, flags)
        task = options.task or "-".join(config.tasks)
        for value, flag in ((task, "--task"), (signing_key, "--signing-key")):
            if not value:
                raise UsageError(f"{flag} is not given, which a new run needs")
        begun = Begun(task, signing_key or "", options.deploy, tuple(devices), config)
    check_name(begun.task)
    require_settings(begun.config)
    return folder, begun


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
