"""Two connections of one client: control, pings and small queries never wait behind data.

The bulk connection is `<client id>:bulk`: an id that no device and no coordinator can have, so that
it meets nobody's, and without `+`, `#` or `/`, for which mosquitto's pattern rules would shut it out. A
broker that gives both connections one id (mosquitto's `use_username_as_clientid`) lets only one of them
live; then everything travels on it, which is slower and not wrong.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from edge_teacher.contract.errors import Unreachable
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

BULK_SUFFIX = ":bulk"

_STUCK_CONNECTED_S = 60.0
"""A connection's thread comes round each second while it is connected; a handler may take a moment."""
_STUCK_APART_S = 300.0
"""Between two tries it waits, looks a name up, which may take minutes, and connects."""


@dataclass(frozen=True)
class Pair:
    """`bulk` is `control` itself where there is only one connection."""

    control: Transport
    bulk: Transport

    def close(self) -> None:
        if self.bulk is not self.control:
            self.bulk.close()
        self.control.close()


@dataclass(frozen=True)
class PahoPair(Pair):
    """Two connections to a real broker, and how they are."""

    control: PahoTransport
    bulk: PahoTransport

    @property
    def transports(self) -> tuple[PahoTransport, ...]:
        return (self.control,) if self.bulk is self.control else (self.control, self.bulk)

    @property
    def problem(self) -> str:
        """Why the first connection is down; empty while it is up."""
        return self.control.problem

    def stuck(self) -> str:
        """What no longer makes progress, as a sentence; empty where all is well.

        Being without a broker is well: the threads try again. A thread that has ended is not.
        """
        now = time.monotonic()
        for which, transport in zip(("control", "bulk"), self.transports, strict=False):
            if not transport.thread_alive:
                return f"the thread of the {which} connection has ended"
            for_s = now - transport.turned_at
            if for_s > (_STUCK_CONNECTED_S if transport.connected else _STUCK_APART_S):
                return f"the thread of the {which} connection has not come round for {for_s:.0f} s"
        return ""

    def renew_certificates(self) -> None:
        """The next connections show what the TLS files hold now. Raises UsageError for unusable ones."""
        for transport in self.transports:
            transport.renew_certificates()


def connect_pair(
    address: BrokerAddress, client_id: str, *, will: Message | None = None
) -> PahoPair:
    """Raises Unreachable if the broker does not answer."""
    control = PahoTransport(address, client_id, will=will)
    try:
        bulk = PahoTransport(address, client_id + BULK_SUFFIX, bulk=True)
    except Unreachable as error:
        log.warning("no second connection, so data and control share one: %s", error)
        return _alone(control, 10)
    try:
        control.still_there()
    except Unreachable:
        bulk.close()
        log.warning(
            "the broker at %s ended the first connection of %s for the second, so data and control "
            "share one; with use_username_as_clientid every connection needs a user name of its own",
            address,
            client_id,
        )
        return _alone(control, 30)
    return PahoPair(control, bulk)


def _alone(control: PahoTransport, timeout_s: float) -> PahoPair:
    try:
        control.wait_connected(timeout_s)
    except Unreachable:
        # Left to itself it would come back, and meet the client that is tried next under its name.
        control.close()
        raise
    return PahoPair(control, control)
