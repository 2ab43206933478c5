"""`edge-teacher`: run an agent, or look at a bundle before it is trusted with one.

Exit codes: 0 done; 1 a check failed, or a file let it down; 2 wrong usage. `run` waits for a broker that is
not there, however long.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from edge_teacher import __version__, check
from edge_teacher import bundle as bundles
from edge_teacher.agent import daemon, settings
from edge_teacher.bundle import TeacherCard
from edge_teacher.contract.errors import FedsaError
from edge_teacher.keys import read_public


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="edge-teacher", description="Serve a private teacher on this device."
    )
    top.add_argument("--version", action="version", version=f"edge-teacher {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run",
        help="answer queries until SIGTERM or SIGINT",
        description="Answer queries until SIGTERM or SIGINT. What no flag says, --config says; SIGHUP reads "
        "it again.",
    )
    _add_run_flags(run)

    check.add_parser(commands, _cores)

    info = commands.add_parser("info", help="verify a bundle and print its card as JSON")
    info.add_argument("bundle", type=Path)
    info.add_argument("--owner-key", type=Path, action="append", required=True)
    return top


def _add_run_flags(run: argparse.ArgumentParser) -> None:
    run.add_argument("--config", type=Path, metavar="FILE", help="settings (TOML): docs/agent.md")
    run.add_argument("--device", help="this device's id (its certificate's CN)")
    run.add_argument("--broker", help="mqtt://HOST:PORT or mqtts://HOST:PORT")
    run.add_argument("--ca", help="certificate authority of the broker (mqtts)")
    run.add_argument("--certificate", help="this device's certificate (mqtts)")
    run.add_argument("--key", help="this device's private key (mqtts)")
    run.add_argument("--bundle", help="the teacher bundle (.fedsa)")
    run.add_argument(
        "--owner-key",
        dest="owner_keys",
        action="append",
        metavar="FILE",
        help="public key whose teachers may run here (repeatable)",
    )
    run.add_argument(
        "--coordinator-key",
        dest="coordinator_keys",
        action="append",
        metavar="FILE",
        help="public key whose students may be installed here (repeatable; none: no students)",
    )
    run.add_argument(
        "--allow",
        action="append",
        metavar="COORDINATOR",
        help="coordinator that is answered (repeatable; none given: any). Who asks says who it is: only "
        "the broker's access rules can vouch for that",
    )
    run.add_argument("--state", help="folder for students")
    run.add_argument("--threads", type=_cores, help="cores for inference (default 1)")
    run.add_argument("--log", choices=["text", "json"], help="form of the log (default text)")
    run.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    run.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="serve Prometheus metrics on 127.0.0.1 (default: none)",
    )


def _cores(text: str) -> int:
    return _number(text, "number of cores", 1024)


def _port(text: str) -> int:
    return _number(text, "port", 65535)


def _number(text: str, what: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what} from 1 to {most}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return {"run": _run, "check": check.run, "info": _info}[options.command](options)
    except FedsaError as error:
        print(f"edge-teacher: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    named = {field.name for field in msgspec.structs.fields(settings.File)} & vars(options).keys()
    said = {name: value for name in named if (value := getattr(options, name)) is not None}
    flags = msgspec.convert(said, settings.File)
    return daemon.run(settings.source(flags, options.config))


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
    sys.stdout.write(check.as_json(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
