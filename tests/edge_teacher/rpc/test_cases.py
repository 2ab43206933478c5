"""The protocol's cases, which are data: against both sides, in memory and over a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.paho import PahoTransport
from tests.brokers import Mosquitto
from tests.edge_teacher.rpc.case_runner import Connect, play

FOLDER = Path(__file__).parent / "cases"
CASES: list[dict[str, Any]] = [
    case
    for path in sorted(FOLDER.glob("*.yaml"))
    for case in yaml.safe_load_all(path.read_text())
    if case
]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path_factory.mktemp("cases")).start()
    yield broker
    broker.kill()


def test_every_case_has_a_name_of_its_own_and_says_why() -> None:
    names = [case["name"] for case in CASES]
    assert len(set(names)) == len(names) >= 30
    assert all(case["why"] for case in CASES)


@pytest.fixture(params=["memory", "mosquitto"])
def connect(request: pytest.FixtureRequest) -> Connect:
    if request.param == "memory":
        memory = MemoryBroker()
        return lambda _client_id: memory.connect()
    address = request.getfixturevalue("broker").address
    return lambda client_id: PahoTransport(address, client_id, bulk=client_id.endswith(":bulk"))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_case(case: dict[str, Any], connect: Connect) -> None:
    play(case, connect)
