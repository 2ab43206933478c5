"""Files of tensors: written so that no reader ever sees half of one, and read without trust."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from edge_teacher.contract.errors import UsageError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors, texts and dicts of them, whole or not at all."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_tensors(path: Path, what: str) -> dict[str, Any]:
    """What `save_tensors` wrote. Raises UsageError, which calls the file `what`."""
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"{path}, {what}, cannot be read: {error.strerror}.") from error
    except Exception as error:
        raise UsageError(
            f"{path} is not {what}: {type(error).__name__} while reading it."
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} is not {what}: it holds a {type(state).__name__}.")
    return state
