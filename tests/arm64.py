"""A Debian for aarch64 in a folder, executed by qemu: no binfmt, no mounts, nothing left behind.

What takes long to fetch is kept between a developer's runs and made anew in CI.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.examples import ROOT

_PACKAGES = "python3,libstdc++6,libgomp1,zlib1g,libssl3"
_SUITE = "bookworm"
PYTHON = "3.11"
"""Of that suite."""
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_SITE = "opt/agent"
_SOURCES = ("edge_teacher", "coordinator", "export", "firmware_configs")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def require_tools() -> None:
    """Skips, naming what is missing."""
    tools = ("mmdebstrap", "qemu-aarch64-static", "chroot")
    missing = [tool for tool in tools if shutil.which(tool, path=_PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (apt install mmdebstrap qemu-user-static)")
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def build_wheel(folder: Path) -> Path:
    """Of a copy of the sources, so that nothing built before gets into it."""
    copy = folder / "source"
    for name in _SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, copy / name)
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(copy))
    (wheel,) = folder.glob("*.whl")
    return wheel


def foreign(version: str = PYTHON) -> list[str]:
    """pip's options for packages of CPython `version` on aarch64."""
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    python = ["--python-version", version, "--implementation", "cp"]
    return [*platforms, *python, "--only-binary=:all:", "--ignore-installed"]


class Root:
    """The folder, with the device package and what it needs in `site`."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.site = folder / _SITE
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [
                    *("mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64"),
                    *(f"--include={_PACKAGES}", _SUITE, str(folder)),
                ],
                check=True,
                env={**os.environ, "PATH": _PATH},
            )
            shutil.copy2(str(shutil.which("qemu-aarch64-static", path=_PATH)), folder)
            wanted = f"{wheel}[edge]"
            pip("install", *foreign(), *constraints, "--target", str(self.site), wanted)
            (folder / "complete").touch()
        # The project itself is of today, whenever the rest was fetched.
        for old in [*self.site.glob("fedsa_edge-*"), *(self.site / name for name in _SOURCES)]:
            shutil.rmtree(old)
        pip("install", *foreign(), "--no-deps", "--target", str(self.site), str(wheel))

    def command(self, *arguments: str) -> list[str]:
        """Python inside, on an emulated Cortex-A57."""
        inside = ["/qemu-aarch64-static", f"/usr/bin/python{PYTHON}", *arguments]
        return [str(shutil.which("chroot", path=_PATH)), str(self.folder), *inside]

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the host's: OPENBLAS_CORETYPE for one would name a processor this one is not."""
        return {
            "PATH": _PATH,
            "QEMU_CPU": "cortex-a57",
            "PYTHONPATH": f"/{_SITE}",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }


@contextmanager
def root_with(wheel: Path, folder: Path) -> Iterator[Root]:
    """`folder`: for the root, in CI; elsewhere it is kept, and used by one run at a time.

    Skips where a tool is missing.
    """
    require_tools()
    if os.environ.get("FEDSA_CI"):
        yield Root(folder / "root", wheel)
        return
    place = _kept()
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = Root(place, wheel)
        (place / "complete").touch()
        _forget_old(place.parent)
        yield root


def _forget_old(folder: Path) -> None:
    """Roots of other dependencies, once nobody has used them for a week."""
    for complete in folder.glob("arm64-*/complete"):
        if complete.stat().st_mtime < time.time() - 7 * 86_400:
            shutil.rmtree(complete.parent)


def _kept() -> Path:
    said = (ROOT / "constraints.txt").read_bytes() + (ROOT / "setup.py").read_bytes()
    key = hashlib.sha256(said + f"{_SUITE} {_PACKAGES} {_PLATFORMS}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "fedsa-edge" / f"arm64-{key}"
