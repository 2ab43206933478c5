"""The coordinator's connection: control and data apart, what it asks through, and who is there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from coordinator.fleet import Fleet
from edge_teacher.contract.topics import check_name
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair

DEFAULT_NAME = "coordinator"


@dataclass(frozen=True)
class Connection:
    """Open for as long as `connect` is entered."""

    address: BrokerAddress
    broker: str
    """What the report calls the broker."""
    caller: Caller
    fleet: Fleet


@contextmanager
def connect(
    address: BrokerAddress, *, name: str = DEFAULT_NAME, broker: str = ""
) -> Iterator[Connection]:
    """Raises Unreachable if the broker does not answer."""
    check_name(name)
    # A certificate's CN is the client id; without one, two commands may run under one name.
    client_id = name if address.certificate else f"{name}-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        pair = connect_pair(address, client_id)
        stack.callback(pair.close)
        caller = Caller(pair.control, name, bulk=pair.bulk)
        stack.callback(caller.close)
        yield Connection(address, broker or str(address), caller, Fleet(pair.control, caller))
