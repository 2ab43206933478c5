"""A whole agent, and a coordinator with its fleet, while the agent's link is gone for some seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from coordinator.fleet import Fleet
from coordinator.questions import Questions
from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.contract.messages import FeaturesQuery
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair
from edge_teacher.runtime import OnnxRuntimeSession
from tests.brokers import Mosquitto
from tests.edge_teacher.nets import OWNER, teacher_answers, teacher_bundle
from tests.edge_teacher.rpc.faults.proxy import CuttingProxy
from tests.edge_teacher.rpc.wire import eventually

DEVICE = "jetson-1"
WIDE = np.random.default_rng(0).integers(0, 256, (1, 1600, 1600, 3), np.uint8)
"""One image, so one run of the network; its feature maps are 15 chunks."""


class Network:
    """Counts what the agent's session is asked to run, and can hold it up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        run = OnnxRuntimeSession.run

        def counting(
            session: OnnxRuntimeSession, images: np.ndarray, outputs: Sequence[str]
        ) -> Mapping[str, np.ndarray]:
            if images.shape == WIDE.shape:  # an idle agent tries what it is fastest with
                self.runs += 1
                assert self.may_go_on.wait(60)
            return run(session, images, outputs)

        monkeypatch.setattr(OnnxRuntimeSession, "run", counting)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


class Ground:
    """An agent behind a link that can be taken away, and a coordinator beside the broker."""

    def __init__(self, folder: Path, broker: Mosquitto, ends: ExitStack) -> None:
        self.proxy = CuttingProxy(broker.port, bytes_per_s=8e6)
        ends.callback(self.proxy.close)
        bundle = folder / "teacher.fedsa"
        bundle.write_bytes(teacher_bundle())
        agent = Agent(
            AgentConfig(
                device=DEVICE,
                bundle=bundle,
                owners=[OWNER.public_key()],
                coordinator_keys=[],
                state=folder / DEVICE,
            )
        )
        theirs = connect_pair(
            BrokerAddress(host="127.0.0.1", port=self.proxy.port), DEVICE, will=agent.will()
        )
        agent.start(theirs.control, theirs.bulk)
        ends.callback(agent.stop)
        ours = connect_pair(broker.address, "ada")
        ends.callback(ours.close)
        self.caller = Caller(ours.control, "ada", bulk=ours.bulk)
        ends.callback(self.caller.close)
        self.fleet = Fleet(ours.control, self.caller)
        (device,) = self.fleet.wait(names=[DEVICE])
        self.session = device.state.session
        self._questions = Questions(self.caller, device.card)
        self._asking = ends.enter_context(ThreadPoolExecutor(1))

    def ask(self) -> Future[np.ndarray]:
        def ask() -> np.ndarray:
            query: Callable[[str], FeaturesQuery] = lambda b: FeaturesQuery(block=b, dtype="f32")  # noqa: E731
            ((_, values),) = self._questions.ask([WIDE], "features", query, "features")
            return values

        return self._asking.submit(ask)

    def blip(self) -> None:
        """Both connections of the device are gone, the broker says so, and coming back fails a few times."""
        self.proxy.go_down()
        eventually(lambda: not self.fleet.devices())
        eventually(lambda: self.proxy.refused >= 4)

    def check(self, future: Future[np.ndarray], network: Network) -> None:
        assert np.allclose(future.result(60), teacher_answers(WIDE)[0], atol=1e-6)
        (device,) = self.fleet.wait(names=[DEVICE])
        assert device.state.session == self.session  # it was away, and never another one
        assert network.runs == 1


@pytest.fixture
def ground(tmp_path: Path, mosquitto: Mosquitto, network: Network) -> Iterator[Ground]:
    with ExitStack() as ends:
        ends.callback(network.may_go_on.set)
        yield Ground(tmp_path, mosquitto, ends)


def test_the_link_is_gone_while_the_network_runs(ground: Ground, network: Network) -> None:
    network.may_go_on.clear()
    future = ground.ask()
    eventually(lambda: network.runs == 1)
    ground.blip()
    assert not future.done()
    network.may_go_on.set()  # it has its answer before it has a connection
    ground.proxy.come_up()
    ground.check(future, network)


def test_the_link_is_gone_while_the_answer_is_on_its_way(ground: Ground, network: Network) -> None:
    future = ground.ask()
    eventually(lambda: ground.caller.wire[DEVICE]["features"].received > 2_000_000)
    assert not future.done()
    ground.blip()
    assert not future.done()
    ground.proxy.come_up()
    ground.check(future, network)
    # What had arrived did not travel again.
    assert ground.caller.wire[DEVICE]["features"].received < 1.6 * 4 * 3 * 800 * 800
