"""Everything that can go wrong, as one tree.

    FedsaError
    ├── UsageError              exit 2   the command, configuration or file given is wrong
    ├── CheckFailed             exit 1   the input was fine and the result is not
    └── RpcError                exit 1   travels over MQTT: code, sentence, what to do
        ├── Malformed           400
        ├── NotAllowed          403
        ├── NotFound            404
        ├── Expired             408
        ├── TooLarge            413
        ├── Busy                429      carries retry_after_s
        ├── RuntimeFailed       500
        ├── Draining            503
        └── Unreachable         (local)  no answer, no broker, or the device is gone

Every message says what was wrong, with which value, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class FedsaError(Exception):
    """Base of all errors a user may meet. `str(error)` is one sentence; `exit_code` is the process's."""

    exit_code: ClassVar[int] = 1


class UsageError(FedsaError):
    """The caller gave something unusable: a path, an option, a configuration key, a data set."""

    exit_code = 2


class CheckFailed(FedsaError):
    """The input was well formed, and a check on it or on the result failed."""


class RpcError(FedsaError):
    """An error that a peer can send. `code` follows HTTP's meaning of the number."""

    code: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Malformed(RpcError):
    code = 400


class NotAllowed(RpcError):
    code = 403


class NotFound(RpcError):
    code = 404


class Expired(RpcError):
    code = 408


class TooLarge(RpcError):
    code = 413


class Busy(RpcError):
    code = 429


class RuntimeFailed(RpcError):
    code = 500


class Draining(RpcError):
    code = 503


class Unreachable(RpcError):
    """Raised on the asking side only: the broker or the device cannot be reached, or did not answer in time."""

    code = 0


_BY_CODE: dict[int, type[RpcError]] = {
    kind.code: kind
    for kind in (Malformed, NotAllowed, NotFound, Expired, TooLarge, Busy, RuntimeFailed, Draining)
}


def error_from_code(code: int, message: str, retry_after_s: float | None = None) -> RpcError:
    """The error a peer meant. An unknown code from a newer peer keeps its class: 4xx or 5xx."""
    kind = _BY_CODE.get(code) or (Malformed if 400 <= code < 500 else RuntimeFailed)
    return kind(message, retry_after_s=retry_after_s)
