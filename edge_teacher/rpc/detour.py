"""Chunks reach a coordinator whose bulk connection alone is down on its control connection meanwhile."""

from __future__ import annotations

import logging

from edge_teacher.rpc.transport import Handler, Transport

log = logging.getLogger(__name__)


class Detour:
    """Used on one thread. A chunk that comes on both connections at the change is the intake's to drop."""

    def __init__(
        self, control: Transport, bulk: Transport, topic_filter: str, handler: Handler
    ) -> None:
        """`topic_filter`: what the bulk connection hears; on control it goes to the same `handler`."""
        self._control = control
        self._bulk = bulk
        self._topic_filter = topic_filter
        self._handler = handler
        self._taken = False
        self._bulk_was_there = True

    def follow(self) -> bool:
        """Look after the bulk connection, now and then: True if what was on its way has a new way now.

        The subscription ends one look after the bulk connection is back: its own SUBSCRIBE travels apart,
        and between the two nobody would hear.
        """
        if self._bulk is self._control:
            return False
        there, self._bulk_was_there = self._bulk_was_there, self._bulk.connected
        if self._bulk_was_there:
            if self._taken and there:
                self._control.unsubscribe(self._topic_filter)
                self._taken = False
            return False
        if self._taken or not self._control.connected:
            return False
        # Not waited for: what is asked for again comes behind it on the same connection.
        self._control.subscribe(self._topic_filter, self._handler, wait=False)
        self._taken = True
        log.info("the bulk connection is down: data comes on the control connection meanwhile")
        return True
