"""What systemd is told of a service, without libsystemd: datagrams to $NOTIFY_SOCKET (sd_notify(3)).

Everywhere else, where that variable is not set, nothing is said and nothing fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

from edge_teacher.contract.errors import UsageError

log = logging.getLogger(__name__)

_LONGEST_STATUS = 500
"""A status is one line in `systemctl status`; a datagram may hold more, nobody reads it."""


class Notifier:
    """The way to the service manager that started this process, or none."""

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        """`address` as in $NOTIFY_SOCKET, empty for none; `watchdog_s`: how often it wants to hear."""
        self.watchdog_s = watchdog_s
        self._status = ""
        self._socket: socket.socket | None = None
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if not address:
            return
        if address[0] not in "/@":
            raise UsageError(
                f"NOTIFY_SOCKET is {address!r}, and must be a path or an abstract name with @: leave it "
                "as systemd has set it"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @property
    def listening(self) -> bool:
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service is up, or has taken a new configuration."""
        self._say(READY="1", STATUS=_line(status))
        self._status = status

    def status(self, status: str) -> None:
        """One line for `systemctl status`; said only when it is another one."""
        if status != self._status:
            self._say(STATUS=_line(status))
            self._status = status

    def reloading(self) -> None:
        """What follows is a reload; `ready` ends it. With the time systemd.service(5) asks for."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._say(RELOADING="1", MONOTONIC_USEC=str(now))

    def stopping(self, status: str) -> None:
        self._say(STOPPING="1", STATUS=_line(status))

    def alive(self) -> None:
        """Feeds the watchdog: to be called only by who has looked whether there is progress."""
        self._say(WATCHDOG="1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _say(self, **fields: str) -> None:
        if self._socket is None:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            # It never waits: a service must not hang because its manager does.
            self._socket.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            log.warning("systemd did not hear %s: %s", ", ".join(fields), error)


def notifier(environment: Mapping[str, str] = os.environ) -> Notifier:
    """From $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID (sd_watchdog_enabled(3)).

    Raises UsageError for values that systemd does not set.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    period = environment.get("WATCHDOG_USEC", "")
    if period and not (period.isascii() and period.isdigit() and int(period)):
        raise UsageError(
            f"WATCHDOG_USEC is {period!r}, and must be a number of microseconds: leave it as systemd "
            "has set it"
        )
    pid = environment.get("WATCHDOG_PID", "")
    ours = not pid or pid == str(os.getpid())
    return Notifier(address, int(period) / 1e6 if address and period and ours else None)


def forget(environment: MutableMapping[str, str]) -> None:
    """Take the variables out of what children inherit: they are not the service."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        with contextlib.suppress(KeyError):
            del environment[name]


def _line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_STATUS]
