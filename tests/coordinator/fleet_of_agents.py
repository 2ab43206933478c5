"""Real agents with small graphs, and a coordinator, on one in-memory broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.fleet import Fleet
from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.contract import frame, topics
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Card, State
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker, MemoryTransport
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.nets import COORDINATOR, OWNER, teacher_bundle


@dataclass
class World:
    folder: Path
    limits: Limits
    published: list[Message] = field(default_factory=list)
    agents: dict[str, Agent] = field(default_factory=dict)
    transports: dict[str, MemoryTransport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.broker = MemoryBroker(self._record)
        self.transport = self.broker.connect()
        self.caller = Caller(self.transport, "ada", tick_s=0.02)
        self.fleet = Fleet(self.transport, self.caller)

    def _record(self, message: Message) -> list[Message]:
        self.published.append(message)
        return [message]

    def add(self, name: str, *, trusts_us: bool = True) -> Card:
        bundle = self.folder / "teacher.fedsa"
        bundle.write_bytes(teacher_bundle())
        agent = Agent(
            AgentConfig(
                device=name,
                bundle=bundle,
                owners=[OWNER.public_key()],
                coordinator_keys=[COORDINATOR.public_key()] if trusts_us else [],
                state=self.folder / name,
                limits=self.limits,
            )
        )
        transport = self.broker.connect(agent.will())
        agent.start(transport)
        self.agents[name], self.transports[name] = agent, transport
        self._hear(name, agent)
        return agent.card()

    def _hear(self, name: str, agent: Agent) -> None:
        """Until the fleet, whose handler comes before this one, has this agent's own birth."""
        session = frame.decode(agent.will().payload, State)[0].session
        heard = threading.Event()

        def on_state(message: Message) -> None:
            state, _ = frame.decode(message.payload, State)
            if state.online and state.session == session:
                heard.set()

        self.transport.subscribe(topics.state(name), on_state)
        assert heard.wait(10), f"{name} was not born"

    def asked(self, device: str = "") -> list[str]:
        """The methods that were asked for, in order."""
        parsed = [topics.parse(m.topic) for m in list(self.published)]
        return [
            t.rest
            for t in parsed
            if t and t.channel in ("req", "put") and (not device or t.owner == device)
        ]


@contextmanager
def world(folder: Path, *names: str, limits: Limits | None = None) -> Iterator[World]:
    with ExitStack() as ends:
        made = World(folder, limits or Limits())
        ends.callback(made.transport.close)
        ends.callback(made.caller.close)
        for name in names:
            made.add(name)
        ends.callback(lambda: [agent.stop() for agent in made.agents.values()])
        yield made
