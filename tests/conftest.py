from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import Mosquitto

# One core is what a test may take; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A plain broker of the test's own on a free loopback port. Skips where there is none."""
    broker = Mosquitto(tmp_path).start()
    yield broker
    broker.kill()
