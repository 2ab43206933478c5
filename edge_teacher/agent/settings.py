"""What an agent is told to be: a TOML file, flags that go before it, and systemd's credentials.

`docs/agent.md` explains every key; a test keeps it whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from edge_teacher.agent.logs import LogFormat, LogLevel
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.topics import check_name
from edge_teacher.rpc.address import BrokerAddress, parse_broker

CREDENTIALS = {"ca": "ca.crt", "certificate": "device.crt", "key": "device.key"}
"""Under these names systemd's credential directory is looked through (LoadCredential= of the unit)."""

LIVE = (
    "allow",
    "coordinator_keys",
    "limits",
    "log_level",
    "memory_bytes",
    "stuck_after_s",
    "telemetry_s",
)
"""What a reload changes at once. The rest is taken at the next start, and a reload that changes it says so."""

Cores = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
Period = Annotated[float, msgspec.Meta(ge=0.1, le=86400)]


class File(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of the file, and of the flags; None where nothing is said.

    Relative paths in a file start at the file's folder; those of flags at the working directory.
    """

    device: str | None = None
    broker: str | None = None
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    bundle: str | None = None
    owner_keys: tuple[str, ...] | None = None
    coordinator_keys: tuple[str, ...] | None = None
    allow: tuple[str, ...] | None = None
    state: str | None = None
    threads: Cores | None = None
    telemetry_s: Period | None = None
    metrics_port: Port | None = None
    tegrastats: str | None = None
    stuck_after_s: Period | None = None
    log: LogFormat | None = None
    log_level: LogLevel | None = None
    memory_bytes: Bytes | None = None
    limits: Limits | None = None


_PATHS = ("ca", "certificate", "key", "bundle", "state", "owner_keys", "coordinator_keys")
_FLAG = {"owner_keys": "--owner-key", "coordinator_keys": "--coordinator-key"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything decided: what the file and the flags say, checked, and defaults for the rest."""

    device: str
    address: BrokerAddress
    bundle: Path
    owner_keys: tuple[Path, ...]
    coordinator_keys: tuple[Path, ...]
    allow: frozenset[str]
    state: Path
    threads: int
    telemetry_s: float
    metrics_port: int | None
    tegrastats: str
    stuck_after_s: float
    log: LogFormat
    log_level: LogLevel
    memory_bytes: int | None
    limits: Limits

    def changed(self, other: Settings) -> tuple[set[str], set[str]]:
        """The names of what differs: (what a reload can change, what needs a new start)."""
        names = {f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)}
        named = {"broker" if name == "address" else name for name in names}
        return named & set(LIVE), named - set(LIVE)

    def with_live_of(self, other: Settings) -> Settings:
        """These, with what can change while the agent runs taken from `other`."""
        return replace(self, **{name: getattr(other, name) for name in LIVE})


@dataclass(frozen=True)
class Source:
    """Where settings are read from, once at the start and again at each reload."""

    flags: File
    path: Path | None
    credentials: Path | None

    def read(self) -> Settings:
        """Raises UsageError with one sentence about the first thing that is wrong."""
        file = File() if self.path is None else read_file(self.path)
        merged = _over(self.flags, file)
        return _decided(_with_credentials(merged, self.credentials))


def source(flags: File, path: Path | None, environment: Mapping[str, str] = os.environ) -> Source:
    """`environment`: where systemd says in $CREDENTIALS_DIRECTORY what it has loaded for this service."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    return Source(flags, path, Path(folder) if folder else None)


def read_file(path: Path) -> File:
    """Raises UsageError for a file that cannot be read, is no TOML, or has a key or value that is none."""
    try:
        raw = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} is no TOML: {error}") from error
    _known(path, "", raw, File)
    if isinstance(raw.get("limits"), dict):
        _known(path, "limits.", raw["limits"], Limits)
    try:
        file = msgspec.convert(raw, File)
    except msgspec.ValidationError as error:
        raise UsageError(f"the configuration {path} is wrong: {_sentence(error)}") from error
    if file.limits is not None:
        for limit in msgspec.structs.fields(Limits):
            if not getattr(file.limits, limit.name) > 0:
                value = getattr(file.limits, limit.name)
                raise UsageError(
                    f"the configuration {path} is wrong: limits.{limit.name} is {value}, and must be "
                    "above 0"
                )
    return _under(file, path.parent)


def _known(
    path: Path, prefix: str, found: Mapping[str, object], keys: type[msgspec.Struct]
) -> None:
    names = {f.name for f in msgspec.structs.fields(keys)}
    for name in found:
        if name not in names:
            raise UsageError(
                f"the configuration {path} has the key {prefix + name!r}, which is none: there are "
                f"{', '.join(prefix + n for n in sorted(names))}"
            )


def _sentence(error: msgspec.ValidationError) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.threads`" with the key as the file has it."""
    what, _, where = str(error).replace(" | null", "").partition(" - at ")
    return f"{where.strip('`').removeprefix('$.')}: {what[:1].lower()}{what[1:]}" if where else what


def _under(file: File, folder: Path) -> File:
    changes: dict[str, object] = {}
    for name in _PATHS:
        value = getattr(file, name)
        if isinstance(value, str):
            changes[name] = str(folder / value)
        elif value is not None:
            changes[name] = tuple(str(folder / path) for path in value)
    return msgspec.structs.replace(file, **changes)


def _over(first: File, second: File) -> File:
    said = {
        name: value for name, value in msgspec.structs.asdict(first).items() if value is not None
    }
    return msgspec.structs.replace(second, **said)


def _with_credentials(file: File, folder: Path | None) -> File:
    """What neither a flag nor the file names, as systemd has loaded it; without TLS none is needed."""
    if folder is None or file.broker is None or not file.broker.startswith("mqtts:"):
        return file
    found = {
        name: str(folder / credential)
        for name, credential in CREDENTIALS.items()
        if getattr(file, name) is None and (folder / credential).exists()
    }
    return msgspec.structs.replace(file, **found)


T = TypeVar("T")


def _needed(value: T | None, name: str) -> T:
    if value:
        return value
    flag = _FLAG.get(name, f"--{name}")
    raise UsageError(f"nothing says {name}: give {flag}, or {name} in the file that --config names")


def _decided(file: File) -> Settings:
    return Settings(
        device=check_name(_needed(file.device, "device")),
        address=parse_broker(
            _needed(file.broker, "broker"),
            ca=_path(file.ca),
            certificate=_path(file.certificate),
            key=_path(file.key),
        ),
        bundle=Path(_needed(file.bundle, "bundle")),
        owner_keys=tuple(Path(path) for path in _needed(file.owner_keys, "owner_keys")),
        coordinator_keys=tuple(Path(path) for path in file.coordinator_keys or ()),
        allow=frozenset(check_name(name) for name in file.allow or ()),
        state=Path(_needed(file.state, "state")),
        threads=file.threads or 1,
        telemetry_s=file.telemetry_s or 5.0,
        metrics_port=file.metrics_port,
        tegrastats=file.tegrastats or "tegrastats",
        stuck_after_s=file.stuck_after_s or 600.0,
        log=file.log or "text",
        log_level=file.log_level or "info",
        memory_bytes=file.memory_bytes,
        limits=file.limits or Limits(),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
