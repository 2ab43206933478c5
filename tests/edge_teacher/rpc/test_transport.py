from __future__ import annotations

import logging

import pytest

from edge_teacher.rpc.transport import Message, deliver, matches


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b", "a", False),
        ("a/b/", "a/b", False),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a//c", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+", "a", True),
        ("+", "/a", False),
        ("/+", "/a", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("+/+", "a/b", True),
        ("A/b", "a/b", False),
    ],
)
def test_matching_follows_the_standard(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize("topic_filter", ["#", "+/info", "+/#"])
def test_a_wildcard_does_not_reach_the_brokers_own_topics(topic_filter: str) -> None:
    # MQTT 5.0, section 4.7.2.
    assert not matches(topic_filter, "$SYS/info")


def test_one_failing_handler_does_not_keep_the_message_from_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Message] = []

    def fails(message: Message) -> None:
        raise ValueError("bad")

    message = Message(topic="a", payload=b"x")
    with caplog.at_level(logging.ERROR):
        deliver([fails, seen.append], message)
    assert seen == [message]
    assert "a message on a could not be handled" in caplog.text
