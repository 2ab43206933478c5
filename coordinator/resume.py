"""What a run was begun with, kept in its folder, so that its name is enough to go on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coordinator.config import Config
from coordinator.settings import config_toml, load_config
from edge_teacher.contract.errors import UsageError
from edge_teacher.files import write_atomically

_COMMAND = "command.json"
_SETTINGS = "settings.toml"


@dataclass(frozen=True)
class Begun:
    """The options of `fedsa train` that decide what a run is. `devices` are names; none: all."""

    task: str
    signing_key: str
    deploy: bool
    devices: tuple[str, ...]
    config: Config


class _Command(msgspec.Struct, frozen=True):
    """As in the file; the settings are beside it, as TOML that people read too."""

    task: str
    signing_key: str
    deploy: bool
    devices: tuple[str, ...]


def keep(folder: Path, begun: Begun, devices: Sequence[str]) -> None:
    """Write down what the run in `folder` is done with; `devices` are those that were there."""
    command = _Command(begun.task, begun.signing_key, begun.deploy, tuple(devices))
    write_atomically(folder / _SETTINGS, config_toml(begun.config).encode())
    write_atomically(folder / _COMMAND, msgspec.json.format(msgspec.json.encode(command)))


def begun_with(folder: Path, config: Path | None, flags: Mapping[str, str]) -> Begun:
    """What the run in `folder` was begun with; the file `config`, if given, is in place of its settings.

    FEDSA_… variables and then `flags` go over them. Raises UsageError if there is no such run, naming
    those that there are.
    """
    try:
        content = (folder / _COMMAND).read_bytes()
    except OSError as error:
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{_COMMAND}"))
        raise UsageError(
            f"there is no run {folder.name} to go on with in {folder.parent} "
            f"(there: {', '.join(dict.fromkeys(there)) or 'none'}); begin one with --name"
        ) from error
    try:
        command = msgspec.json.decode(content, type=_Command)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{folder / _COMMAND} cannot be read: {error}; begin another run"
        ) from error
    settings = load_config(config or folder / _SETTINGS, flags)
    return Begun(command.task, command.signing_key, command.deploy, command.devices, settings)
