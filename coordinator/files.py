"""Files of tensors: written so that no reader ever sees half of one, and read without trust."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from edge_teacher.contract.errors import UsageError
from edge_teacher.files import write_atomically


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors, texts and dicts of them, whole or not at all."""
    # By way of memory: torch reports a full disk as an error of its own.
    file = io.BytesIO()
    torch.save(state, file)
    write_atomically(path, file.getvalue())


def load_tensors(path: Path, what: str) -> dict[str, Any]:
    """What `save_tensors` wrote. Raises UsageError, which calls the file `what`."""
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"{path}, {what}, cannot be read: {error.strerror}.") from error
    except Exception as error:
        # torch and zipfile have many names for it, none of which a reader can do anything with.
        raise UsageError(
            f"{path} is not {what}: it is cut off, damaged or another kind of file."
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} is not {what}: it holds a {type(state).__name__}.")
    return state
