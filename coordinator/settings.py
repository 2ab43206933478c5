"""The configuration from a TOML file, environment variables and flags, and back into a file."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomllib

from coordinator.config import TASKS, Config, TaskConfig
from edge_teacher.contract.errors import UsageError

_PREFIX = "FEDSA_"


def load_config(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Defaults, then the file, then FEDSA_… variables, then `overrides` ({"section.key": text}).

    `environ` is the process's environment unless given. Raises UsageError for a file that cannot be
    read, a key that does not exist (naming the nearest that does), or a value of the wrong type or
    out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_toml(path)
        _require_known(values, f"in {path}")
        _convert(values, f"in {path}")
    for origin, texts in (
        ("in the environment", _from_environment(os.environ if environ is None else environ)),
        ("on the command line", dict(overrides or {})),
    ):
        for key, text in texts.items():
            if _field(key) is None:
                raise UsageError(_unknown(key, origin))
            section, _, name = key.rpartition(".")
            task = task_of(key)
            if task is not None:
                target = values.setdefault(TASKS, {}).setdefault(task, {})
            else:
                target = values.setdefault(section, {}) if section else values
            target[name] = _parse(key, text, origin)
        _convert(values, origin)
    return _convert(values, "")


def config_toml(config: Config) -> str:
    """`config` as TOML that `load_config` reads back to the same values, every key explained."""
    lines: list[str] = []
    for section, struct in ((None, config), *_sections(config)):
        if section:
            lines += ["", f"# {_first_line(struct)}", f"[{section}]"]
        for field in msgspec.structs.fields(struct):
            value = getattr(struct, field.name)
            if not isinstance(value, (msgspec.Struct, dict)):
                lines.append(f"{field.name} = {_toml(value)}  # {_description(field)}")
    return "\n".join(lines) + "\n"


def example_config() -> str:
    """The defaults as a commented TOML file."""
    return config_toml(Config())


def task_of(key: str) -> str | None:
    """The task that a key `tasks.NAME.key` is of; None for any other key."""
    parts = key.split(".")
    return ".".join(parts[1:-1]) if parts[0] == TASKS and len(parts) > 2 else None


def config_keys() -> dict[str, str]:
    """Every key there is, `section.key`, with its meaning."""
    return {key: _description(field) for key, field in _KEYS.items()}


def environment_name(key: str) -> str:
    """`selection.k` -> `FEDSA_SELECTION_K`."""
    return _PREFIX + re.sub(r"[.\-]", "_", key).upper()


def _sections(config: Config) -> Iterator[tuple[str, msgspec.Struct]]:
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, msgspec.Struct):
            yield field.name, value
    for name, task in config.tasks.items():
        yield f"{TASKS}.{_toml(name)}", task


def _keys() -> dict[str, msgspec.structs.FieldInfo]:
    """Every key there is, `section.key`, with its field."""
    keys = {}
    for field in msgspec.structs.fields(Config):
        if isinstance(field.default, msgspec.Struct):
            for inner in msgspec.structs.fields(field.default):
                keys[f"{field.name}.{inner.name}"] = inner
        elif field.name != TASKS:
            keys[field.name] = field
    return keys


_KEYS = _keys()
_TASK_FIELDS = {field.name: field for field in msgspec.structs.fields(TaskConfig)}
_SECTIONS = {key.split(".")[0] for key in _KEYS if "." in key}


def _field(key: str) -> msgspec.structs.FieldInfo | None:
    if task_of(key) is not None:
        return _TASK_FIELDS.get(key.rpartition(".")[2])
    return _KEYS.get(key)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The configuration {path} is not TOML: {error}.") from error


def _require_known(values: dict[str, Any], origin: str) -> None:
    for name, value in values.items():
        if name == TASKS:
            _require_tasks(value, origin)
        elif name in _SECTIONS:
            if not isinstance(value, dict):
                raise UsageError(f"{name} {origin} is a section: write it as [{name}].")
            for inner in value:
                if f"{name}.{inner}" not in _KEYS:
                    raise UsageError(_unknown(f"{name}.{inner}", origin))
        elif name not in _KEYS:
            raise UsageError(_unknown(name, origin))


def _require_tasks(value: Any, origin: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(task, dict) for task in value.values()):
        raise UsageError(f"tasks {origin} has a section for each task: write it as [tasks.NAME].")
    for task, keys in value.items():
        for key in keys:
            if key not in _TASK_FIELDS:
                raise UsageError(_unknown(f"{TASKS}.{task}.{key}", origin))


def _unknown(key: str, origin: str) -> str:
    task = task_of(key)
    if task is not None:
        keys = ", ".join(_TASK_FIELDS)
        return f"There is no configuration key {key} ({origin}); a task has the keys {keys}."
    near = difflib.get_close_matches(key, [*_KEYS, *_SECTIONS], n=1, cutoff=0.4)
    # A right name in the wrong section is the commonest slip, and far in spelling.
    same = [k for k in _KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same or near
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"There is no configuration key {key} ({origin}){hint}"


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The keys that FEDSA_… variables set.

    A variable that neither begins with a section's name nor resembles a key is another command's.
    """
    names = {environment_name(key): key for key in _KEYS}
    found = {}
    for variable in sorted(v for v in environ if v.startswith(_PREFIX)):
        if variable in names:
            found[names[variable]] = environ[variable]
            continue
        if variable.startswith(environment_name(TASKS) + "_"):
            raise UsageError(
                f"The environment variable {variable} sets no configuration key; tasks are set in the "
                "file, or with --tasks.NAME.key."
            )
        ours = any(variable.startswith(environment_name(s) + "_") for s in _SECTIONS)
        near = difflib.get_close_matches(variable, names, n=1, cutoff=0.4 if ours else 0.85)
        if ours or near:
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"The environment variable {variable} sets no configuration key{hint}")
    return found


def _parse(key: str, text: str, origin: str) -> Any:
    """A text from the environment or a flag as its key's type; `key` is one that there is."""
    field = _field(key)
    assert field is not None
    try:
        return msgspec.convert(text, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{key} {origin} is {text!r}: {_sentence(error)} ({_description(field)})."
        ) from error


def _convert(values: dict[str, Any], origin: str) -> Config:
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        where = re.search(r"`\$\.?([^`]*)`", str(error))
        key = where.group(1) if where else "the configuration"
        meaning = f" ({_description(_KEYS[key])})" if key in _KEYS else ""
        raise UsageError(f"{key} {origin}: {_sentence(error)}{meaning}.") from error
    _require_finite(msgspec.to_builtins(config), "", origin)
    return config


def _require_finite(values: Mapping[str, Any], place: str, origin: str) -> None:
    """TOML and Python read `inf`, which is in every range that has no upper end."""
    for name, value in values.items():
        if isinstance(value, dict):
            _require_finite(value, f"{place}{name}.", origin)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{place}{name} {origin} is {value}: it must be a finite number.")


def _sentence(error: msgspec.ValidationError) -> str:
    return str(error).split(" - at ")[0].replace("`", "").replace("Expected", "it must be")


def _description(field: msgspec.structs.FieldInfo) -> str:
    metas = getattr(field.type, "__metadata__", ())
    return next((meta.description for meta in metas if meta.description), field.name)


def _first_line(struct: msgspec.Struct) -> str:
    return (type(struct).__doc__ or "").strip().splitlines()[0]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's string escapes are all TOML's too.
        return msgspec.json.encode(value).decode()
    return repr(value)
