"""The coordinator's connection: one transport, what it asks through, and who is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coordinator.fleet import Fleet
from edge_teacher.contract.topics import check_name
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport

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
    transport = PahoTransport(address, check_name(name))
    caller = Caller(transport, name)
    try:
        yield Connection(address, broker or str(address), caller, Fleet(transport, caller))
    finally:
        caller.close()
        transport.close()
