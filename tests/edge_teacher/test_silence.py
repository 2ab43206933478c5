"""What the device package loads, and that nothing it loads tells anybody, or leaves a trace at home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edge_teacher

ROOT = Path(edge_teacher.__file__).parents[1]


def after_importing(modules: str, home: Path) -> set[str]:
    """The top-level packages that are loaded then."""
    program = f"import {modules}, json, sys; print(json.dumps(sorted(sys.modules)))"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_the_agent_loads_nothing_of_the_workstation(tmp_path: Path) -> None:
    loaded = after_importing("edge_teacher.cli", tmp_path)
    assert {"edge_teacher", "msgspec", "paho"} <= loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "coordinator", "export", "PIL", "rich"}


@pytest.mark.parametrize(
    "module",
    ["edge_teacher.cli", "edge_teacher.runtime", "export.checks.student", "export.student"],
)
def test_onnx_runtime_reports_nothing(module: str, tmp_path: Path) -> None:
    """Its official builds do, and begin by keeping an identifier and a queue of events below $HOME."""
    # It may come only when a graph is opened, and always comes after the package.
    assert "onnxruntime" in after_importing(f"{module}, onnxruntime", tmp_path)
    assert list(tmp_path.rglob("*")) == []
