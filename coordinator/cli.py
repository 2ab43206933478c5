"""`fedsa`: the workstation's command.

Exit codes: 0 done; 1 a check failed, or a device or the broker let the run down; 2 wrong usage or
unusable input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.table import Table

from coordinator.cache_commands import add_cache
from coordinator.export_commands import add_export
from coordinator.task_flags import task_flags
from coordinator.terminal import console as stderr
from coordinator.terminal import interruption, percent, plain, print_json, printable, stdout
from coordinator.train_command import add_train, finish, new_run, run_options, run_settings
from edge_teacher import __version__
from edge_teacher.contract.errors import FedsaError, UsageError
from edge_teacher.contract.topics import check_name
from edge_teacher.keys import key_id, private_key_at, public_path, read_public
from edge_teacher.rpc.address import BrokerAddress, parse_broker

# Before torch is loaded. Its threads wait for each other many times a second; one that spins while it
# waits takes the core from the one it waits for, on any machine that has something else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "WORLD_SIZE" in os.environ:
    # Several processes: torch would warn, once for each of them, of layers that one step does not use.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
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

    run_options(demo)

    add_train(command, _broker_options)

    command("config", _config, "print every setting with its default, as TOML", json=False)

    pair = command("key", _key, "make an Ed25519 key pair, or show the one there is")
    pair.add_argument("--out", type=Path, required=True, help="the private key; .pub beside it")

    devices = command("devices", _devices, "who is on the broker")
    devices.add_argument("--wait", type=_seconds, default=1.0, help="seconds to listen (default 1)")
    _broker_options(devices)

    add_export(commands, command)
    add_cache(commands, command)

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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space: a run goes on with --resume" if full else ""
        stderr.print(f"fedsa: {error.strerror or error}{place}{advice}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        stderr.print("fedsa: interrupted; everything that was started has been ended")
        return INTERRUPTED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: children are ended, nothing is left running."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        interruption.ask()

    interruption.clear()
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    except KeyboardInterrupt:
        interruption.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ── commands; each imports what it needs, so that none waits for torch that does not use it ──


def _demo(options: argparse.Namespace) -> int:
    from coordinator.demo import EXAMPLES, DemoOptions, run_demo, with_demo_data
    from coordinator.settings import load_config

    examples = options.examples or EXAMPLES
    config = load_config(options.config, run_settings(options))
    if config.broker.url:
        stderr.print(f"The demo starts a broker of its own; {config.broker.url} is not used")
    folder = new_run(options.runs)
    report = run_demo(
        DemoOptions(
            config=with_demo_data(config, examples),
            examples=examples,
            folder=folder,
            broker=options.broker,
            port=options.port,
        )
    )
    finish(report, folder, options)
    return 0


def _config(_options: argparse.Namespace) -> int:
    from coordinator.settings import example_config

    sys.stdout.write(example_config())
    return 0


def _key(options: argparse.Namespace) -> int:

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
        table.add_row(*("-" if value is None else printable(str(value)) for value in cells))
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


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


if __name__ == "__main__":
    sys.exit(main())
