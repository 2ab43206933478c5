"""Requests that are answered several at once: who answers them takes them from a line, in fair turn."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from edge_teacher.rpc.fair_queue import Job

Request = TypeVar("Request", bound=msgspec.Struct)


@dataclass(frozen=True)
class Joint(Generic[Request]):
    """A method of which an `Engine` answers several requests at once; they carry this struct."""

    request: type[Request]
    about: Callable[[Request], Hashable]
    """Equal for two requests, also of two methods, that are best answered together."""


class Asked(Protocol):
    """A request that was taken: it ends with one `answer` or one `refuse`, from whatever thread."""

    @property
    def job(self) -> Job: ...

    @property
    def request(self) -> Any: ...

    @property
    def about(self) -> Hashable: ...

    @property
    def tensors(self) -> Any: ...

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it: not once it is withdrawn, or its time has passed."""
        ...

    def answer(self, body: msgspec.Struct, tensors: Any) -> None:
        """The tensors are sent from where they lie: they must not change afterwards."""
        ...

    def refuse(self, error: Exception) -> None:
        """What is no RpcError is told as a failure of the runtime."""
        ...


class Line(Protocol):
    """What waits for an engine."""

    def take(self, timeout_s: float, without: Container[str] = ()) -> Asked | None:
        """The next in turn, that anybody still waits for; None if there is none in `timeout_s`.

        `without`: coordinators whose turn it is not; with them it does not wait.
        """
        ...

    def take_all(self, about: Hashable) -> list[Asked]:
        """Those that are about this, out of their turn."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Small answers given by this thread meanwhile leave as one: it costs less."""
        ...

    @property
    def closed(self) -> bool:
        """Nothing comes any more."""
        ...


class Engine(Protocol):
    """Answers the requests of joint methods, on as many threads as it says."""

    @property
    def threads(self) -> int: ...

    def serve(self, line: Line) -> None:
        """Until the line is closed and all that was taken has its end."""
        ...
