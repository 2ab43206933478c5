"""Two connections of one client: control, pings and small queries never wait behind data.

The bulk connection is `<client id>:bulk`: an id that no device and no coordinator can have, so that
it meets nobody's, and without `+`, `#` or `/`, for which mosquitto's pattern rules would shut it out. A
broker that gives both connections one id (mosquitto's `use_username_as_clientid`) lets only one of them
live; then everything travels on it, which is slower and not wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edge_teacher.contract.errors import Unreachable
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

BULK_SUFFIX = ":bulk"


@dataclass(frozen=True)
class Pair:
    """`bulk` is `control` itself where there is only one connection."""

    control: Transport
    bulk: Transport

    def close(self) -> None:
        if self.bulk is not self.control:
            self.bulk.close()
        self.control.close()


def connect_pair(address: BrokerAddress, client_id: str, *, will: Message | None = None) -> Pair:
    """Raises Unreachable if the broker does not answer."""
    control = PahoTransport(address, client_id, will=will)
    try:
        bulk = PahoTransport(address, client_id + BULK_SUFFIX, bulk=True)
    except Unreachable as error:
        log.warning("no second connection, so data and control share one: %s", error)
        control.wait_connected(10)
        return Pair(control, control)
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
        control.wait_connected(30)
        return Pair(control, control)
    return Pair(control, bulk)
