from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import Mosquitto

# One core is what a test may take; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the packages do: a test may load ONNX Runtime before any of them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """On a user's machine a missing tool skips, visibly; in CI nothing but a missing GPU may."""
    report = yield
    excused = item.get_closest_marker("gpu") is not None or hasattr(report, "wasxfail")
    if os.environ.get("FEDSA_CI") and report.skipped and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A plain broker of the test's own on a free loopback port. Skips where there is none."""
    broker = Mosquitto(tmp_path).start()
    yield broker
    broker.kill()
