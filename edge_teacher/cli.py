"""`edge-teacher`: run an agent, or look at a bundle before it is trusted with one.

Exit codes: 0 done; 1 a check failed, or the broker or a file let it down; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from edge_teacher import __version__, check
from edge_teacher import bundle as bundles
from edge_teacher.agent.service import AgentConfig, serve
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract.errors import FedsaError
from edge_teacher.contract.topics import check_name
from edge_teacher.files import locked
from edge_teacher.keys import read_public
from edge_teacher.rpc.address import parse_broker


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="edge-teacher", description="Serve a private teacher on this device."
    )
    top.add_argument("--version", action="version", version=f"edge-teacher {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="answer queries until SIGTERM or SIGINT")
    run.add_argument("--device", required=True, help="this device's id (its certificate's CN)")
    run.add_argument("--broker", required=True, help="mqtt://HOST:PORT or mqtts://HOST:PORT")
    run.add_argument("--ca", type=Path, help="certificate authority of the broker (mqtts)")
    run.add_argument("--certificate", type=Path, help="this device's certificate (mqtts)")
    run.add_argument("--key", type=Path, help="this device's private key (mqtts)")
    run.add_argument("--bundle", type=Path, required=True, help="the teacher bundle (.fedsa)")
    run.add_argument(
        "--owner-key",
        type=Path,
        action="append",
        required=True,
        help="public key whose teachers may run here (repeatable)",
    )
    run.add_argument(
        "--coordinator-key",
        type=Path,
        action="append",
        default=[],
        help="public key whose students may be installed here (repeatable; none: no students)",
    )
    run.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="COORDINATOR",
        help="coordinator that is answered (repeatable; none given: any). Who asks says who it is: only "
        "the broker's access rules can vouch for that",
    )
    run.add_argument("--state", type=Path, required=True, help="folder for students")
    run.add_argument("--threads", type=_cores, default=1, help="cores for inference (default 1)")

    check.add_parser(commands)

    info = commands.add_parser("info", help="verify a bundle and print its card as JSON")
    info.add_argument("bundle", type=Path)
    info.add_argument("--owner-key", type=Path, action="append", required=True)
    return top


def _cores(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cores from 1 to 1024")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        return {"run": _run, "check": check.run, "info": _info}[options.command](options)
    except FedsaError as error:
        print(f"edge-teacher: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = AgentConfig(
        device=check_name(options.device),
        bundle=options.bundle,
        owners=[read_public(path) for path in options.owner_key],
        coordinator_keys=[read_public(path) for path in options.coordinator_key],
        state=options.state,
        allowed=frozenset(check_name(name) for name in options.allow),
        threads=options.threads,
    )
    address = parse_broker(
        options.broker, ca=options.ca, certificate=options.certificate, key=options.key
    )
    with locked(config.state, "agent"):
        serve(config, address, stop)
    return 0


def _info(options: argparse.Namespace) -> int:
    bundle = bundles.read(options.bundle, [read_public(path) for path in options.owner_key])
    kind = "teacher" if isinstance(bundle.card, TeacherCard) else "student"
    summary = {
        "kind": kind,
        "card": msgspec.to_builtins(bundle.card),
        "files": {name: len(data) for name, data in sorted(bundle.files.items())},
        "sha256": bundle.digest,
        "signed_by": bundle.signed_by,
    }
    sys.stdout.write(
        msgspec.json.format(msgspec.json.encode(summary), indent=2).decode() + os.linesep
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
