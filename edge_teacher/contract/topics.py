"""Topic names of contract version 1: build and parse.

`fedsa/v1/<device>/state|card|telemetry|ctl`, `fedsa/v1/<device>/req/<method>`,
`fedsa/v1/<coordinator>/rsp/<device>`, and for what is large `fedsa/v1/<device>/put/<method>` and
`fedsa/v1/<coordinator>/data/<device>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from edge_teacher.contract.errors import UsageError

ROOT = "fedsa/v1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_METHOD = re.compile(r"[a-z_]+(\.[a-z_]+)?")
_LONGEST = 256
"""Characters: two names, a method, and what stands between them."""
_CHANNELS = ("state", "card", "telemetry", "ctl")


def check_name(name: str) -> str:
    """A device's or coordinator's id: certificate CN = client id = topic level. Returned unchanged."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no usable id: take 1 to 64 letters, digits, '_', '.' or '-', "
            "beginning with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Topic:
    """A parsed topic. `owner` is the device, or the coordinator for a response."""

    owner: str
    channel: str
    rest: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (ROOT, self.owner, self.channel, self.rest) if part)


def state(device: str) -> str:
    return str(Topic(check_name(device), "state"))


def card(device: str) -> str:
    return str(Topic(check_name(device), "card"))


def telemetry(device: str) -> str:
    return str(Topic(check_name(device), "telemetry"))


def control(device: str) -> str:
    return str(Topic(check_name(device), "ctl"))


def request(device: str, method: str) -> str:
    return str(Topic(check_name(device), "req", method))


def requests(device: str) -> str:
    """The filter a device subscribes to."""
    return str(Topic(check_name(device), "req", "#"))


def put(device: str, method: str) -> str:
    """A request that carries much: the device hears it on its bulk connection."""
    return str(Topic(check_name(device), "put", method))


def puts(device: str) -> str:
    """The filter a device's bulk connection subscribes to."""
    return str(Topic(check_name(device), "put", "#"))


def response(coordinator: str, device: str) -> str:
    return str(Topic(check_name(coordinator), "rsp", check_name(device)))


def responses(coordinator: str) -> str:
    """The filter a coordinator subscribes to."""
    return str(Topic(check_name(coordinator), "rsp", "+"))


def data(coordinator: str, device: str) -> str:
    """Where the chunks of an answer go: the coordinator hears them on its bulk connection."""
    return str(Topic(check_name(coordinator), "data", check_name(device)))


def all_data(coordinator: str) -> str:
    """The filter a coordinator's bulk connection subscribes to."""
    return str(Topic(check_name(coordinator), "data", "+"))


def everyone(channel: str) -> str:
    """The filter for one channel of all devices, e.g. `state`."""
    return f"{ROOT}/+/{channel}"


def parse(topic: str) -> Topic | None:
    """The parts of a topic, or None for one this contract does not know."""
    return _parse(topic) if len(topic) <= _LONGEST else None


@lru_cache(maxsize=512)  # the same few topics, several times for every message
def _parse(topic: str) -> Topic | None:
    if not topic.startswith(ROOT + "/"):
        return None
    levels = topic[len(ROOT) + 1 :].split("/")
    if len(levels) < 2 or not _NAME.fullmatch(levels[0]):
        return None
    owner, channel, *rest = levels
    if channel in _CHANNELS and not rest:
        return Topic(owner, channel)
    if channel in ("req", "put") and len(rest) == 1 and _METHOD.fullmatch(rest[0]):
        return Topic(owner, channel, rest[0])
    if channel in ("rsp", "data") and len(rest) == 1 and _NAME.fullmatch(rest[0]):
        return Topic(owner, channel, rest[0])
    return None


def may_answer_to(response_topic: str, device: str) -> bool:
    """Whether `device` may publish an answer there: only below a coordinator's `rsp`, under its own name."""
    parsed = parse(response_topic)
    return parsed is not None and parsed.channel == "rsp" and parsed.rest == device
