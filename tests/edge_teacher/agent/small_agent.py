"""An agent as a process of its own: BROKER_PORT BUNDLE STATE MEMORY_BYTES (0: what the machine gives)."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from edge_teacher.agent.service import AgentConfig, serve
from edge_teacher.rpc.address import BrokerAddress
from tests.edge_teacher.nets import OWNER


def main() -> None:
    port, bundle, state, memory = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = AgentConfig(
        device="d1",
        bundle=Path(bundle),
        owners=[OWNER.public_key()],
        coordinator_keys=[],
        state=Path(state),
        memory_bytes=int(memory) or None,
    )
    serve(config, BrokerAddress(host="127.0.0.1", port=int(port)), stop)


if __name__ == "__main__":
    main()
