"""An agent as a process of its own: BROKER_PORT BUNDLE STATE MEMORY_BYTES (0: what the machine gives)."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.pair import connect_pair
from tests.edge_teacher.nets import OWNER


def main() -> None:
    port, bundle, state, memory = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    agent = Agent(
        AgentConfig(
            device="d1",
            bundle=Path(bundle),
            owners=[OWNER.public_key()],
            coordinator_keys=[],
            state=Path(state),
            memory_bytes=int(memory) or None,
        )
    )
    pair = connect_pair(BrokerAddress(host="127.0.0.1", port=int(port)), "d1", will=agent.will())
    agent.start(pair.control, pair.bulk)
    stop.wait()
    agent.stop()


if __name__ == "__main__":
    main()
