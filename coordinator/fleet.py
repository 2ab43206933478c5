"""Who is there: births, wills and cards, as the broker retains them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from edge_teacher.contract import frame, topics
from edge_teacher.contract.errors import RpcError, Unreachable
from edge_teacher.contract.messages import Card, State
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.transport import Message, Transport

Kind = TypeVar("Kind", Card, State)


@dataclass(frozen=True)
class Device:
    """What a device says of itself."""

    name: str
    state: State
    card: Card


GRACE_S = 10.0


class Fleet:
    """Follows every device. When one leaves or stays away, what it was being asked fails."""

    def __init__(self, transport: Transport, caller: Caller, *, grace_s: float = GRACE_S) -> None:
        """`grace_s`: how long a device may be away, without having said so, before questions fail."""
        self._caller = caller
        self._grace_s = grace_s
        self._states: dict[str, State] = {}
        self._cards: dict[str, Card] = {}
        self._changed = threading.Condition()
        self._changed_at = time.monotonic()
        # Cards first: a birth then always finds its card.
        transport.subscribe(topics.everyone("card"), self._on_card)
        transport.subscribe(topics.everyone("state"), self._on_state)

    def devices(self, *, online_only: bool = True) -> list[Device]:
        """By name."""
        with self._changed:
            known = sorted(self._states.keys() & self._cards.keys())
            found = [Device(name, self._states[name], self._cards[name]) for name in known]
        return [d for d in found if d.state.online or not online_only]

    def wait(
        self,
        at_least: int = 1,
        *,
        names: Sequence[str] = (),
        timeout_s: float = 10,
        quiet_s: float = 0.5,
    ) -> list[Device]:
        """Until the named devices are online, or at least so many and nobody else has come for `quiet_s`.

        Retained births arrive one by one: who takes the first has a random part of the fleet. Raises
        Unreachable, naming who is there and who is not, when the time is over.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = self.devices()
                missing = sorted(set(names) - {d.name for d in found})
                now = time.monotonic()
                quiet = self._changed_at + quiet_s
                enough = len(found) >= at_least and not missing
                if (enough and (names or now >= quiet)) or now >= end:
                    break
                self._changed.wait(min(end, quiet if enough else end) - now)
        if enough:
            return found
        online = ", ".join(d.name for d in found) or "none"
        wanted = (
            f"{', '.join(missing)} did not announce themselves"
            if missing
            else (f"{len(found)} of {at_least} teacher{'s' * (at_least != 1)} announced themselves")
        )
        raise Unreachable(
            f"{wanted} within {timeout_s:g} s (online: {online}); are the agents running, and on "
            "this broker?"
        )

    def _on_card(self, message: Message) -> None:
        self._note(message, Card, self._cards)

    def _on_state(self, message: Message) -> None:
        topic = topics.parse(message.topic)
        state = self._note(message, State, self._states)
        if topic is None:
            return
        if state is None or not state.online:
            # A will is also what a connection leaves that is back a second later.
            grace_s = 0.0 if state is None or state.leaving else self._grace_s
            self._caller.device_gone(topic.owner, "went offline", grace_s=grace_s)
            return
        # Also one that has restarted is asked again: it says 404 to what it has forgotten.
        self._caller.device_back(topic.owner)

    def _note(self, message: Message, kind: type[Kind], into: dict[str, Kind]) -> Kind | None:
        topic = topics.parse(message.topic)
        if topic is None:
            return None
        found: Kind | None
        try:
            found, _ = frame.decode(message.payload, kind)
        except RpcError:
            found = None  # cleared, or not of this contract: not a device to us, whatever it was
        if isinstance(found, Card) and found.device != topic.owner:
            found = (
                None  # questions go to the name in the card: it must be the one that published it
            )
        if isinstance(found, Card) and found.teacher.saliency_tap not in found.teacher.taps:
            found = None  # nothing could be asked of it
        with self._changed:
            if found is None:
                into.pop(topic.owner, None)
            else:
                into[topic.owner] = found
            self._changed_at = time.monotonic()
            self._changed.notify_all()
        return found
