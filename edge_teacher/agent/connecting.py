"""From a loaded agent to one that answers: tried until it works, for a week if need be."""

from __future__ import annotations

import logging
import threading
import time

from edge_teacher.agent.service import Agent
from edge_teacher.contract.errors import FedsaError, RpcError
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.backoff import Backoff
from edge_teacher.rpc.pair import PahoPair, connect_pair

log = logging.getLogger(__name__)

_STUCK_S = 300.0
"""Of one try: looking a name up may take minutes, and the rest has time limits of its own."""


class Connecting:
    """The first connection. Afterwards the connections keep themselves: see PahoTransport.

    A broker that is not there, has no name yet, or refuses this device is no reason to end: a network comes
    up late, a certificate is replaced, a clock is set. Each new reason is logged once.
    """

    def __init__(
        self, agent: Agent, address: BrokerAddress, *, retry: Backoff | None = None
    ) -> None:
        self._agent = agent
        self._address = address
        self._retry = retry or Backoff(first_s=0.5, longest_s=15.0)
        self._pair: PahoPair | None = None
        self._problem = "no try has ended yet"
        self._turned_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._try, name="connecting", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why there is no connection now; empty while there is one."""
        return self._problem if self._pair is None else self._pair.problem

    def stuck(self) -> str:
        """What makes no progress, as a sentence; empty where all is well, with or without a broker."""
        if self._pair is not None:
            return self._pair.stuck()
        if not self._thread.is_alive():
            return "the thread that connects has ended"
        for_s = time.monotonic() - self._turned_at
        return f"a try to connect has taken {for_s:.0f} s" if for_s > _STUCK_S else ""

    def renew_certificates(self) -> None:
        """Raises UsageError for TLS files that cannot be used. Each first try reads them anew by itself."""
        if self._pair is not None:
            self._pair.renew_certificates()
        else:
            self._address.ssl_context()

    def stop(self) -> None:
        """No further try. One under way ends with this process, if it takes longer than a moment."""
        self._stopped.set()
        self._thread.join(1)

    def _try(self) -> None:
        while not self._stopped.is_set():
            self._turned_at = time.monotonic()
            pair = None
            try:
                pair = connect_pair(
                    self._address, self._agent.config.device, will=self._agent.will()
                )
                self._agent.start(pair.control, pair.bulk)
            except FedsaError as error:
                if pair is not None:
                    pair.close()
                self._wait(error)
            else:
                self._pair = pair
                return

    def _wait(self, error: FedsaError) -> None:
        wait_s = self._retry.next_s()
        said = str(error)
        if said != self._problem:
            again = "" if isinstance(error, RpcError) else "; it is read again each time"
            log.warning("%s%s; trying again, at most 15 s apart", said, again)
        self._problem = said
        self._stopped.wait(wait_s)
