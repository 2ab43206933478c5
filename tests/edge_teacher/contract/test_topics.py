from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_teacher.contract import topics
from edge_teacher.contract.errors import UsageError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)


@given(names, names)
def test_what_is_built_is_parsed(device: str, coordinator: str) -> None:
    assert topics.parse(topics.state(device)) == topics.Topic(device, "state")
    assert topics.parse(topics.card(device)) == topics.Topic(device, "card")
    assert topics.parse(topics.telemetry(device)) == topics.Topic(device, "telemetry")
    assert topics.parse(topics.control(device)) == topics.Topic(device, "ctl")
    request = topics.request(device, "student.offer")
    assert topics.parse(request) == topics.Topic(device, "req", "student.offer")
    response = topics.response(coordinator, device)
    assert topics.parse(response) == topics.Topic(coordinator, "rsp", device)


def test_the_names_of_version_1() -> None:
    assert topics.state("jetson-1") == "fedsa/v1/jetson-1/state"
    assert topics.request("jetson-1", "put_images") == "fedsa/v1/jetson-1/req/put_images"
    assert topics.requests("jetson-1") == "fedsa/v1/jetson-1/req/#"
    assert topics.response("ada", "jetson-1") == "fedsa/v1/ada/rsp/jetson-1"
    assert topics.responses("ada") == "fedsa/v1/ada/rsp/+"
    assert topics.everyone("state") == "fedsa/v1/+/state"


BAD_NAMES = ["", "+", "#", "a/b", "a b", ".a", "-a", "ä", "a\n", "a\0", "a" * 65, "../a", "$SYS"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_id_that_could_be_another_topic_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no usable id"):
        topics.check_name(name)
    for build in (topics.state, topics.card, topics.control, topics.requests, topics.responses):
        with pytest.raises(UsageError):
            build(name)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fedsa/v1",
        "fedsa/v1/",
        "fedsa/v1/d",
        "fedsa/v1/d/state/more",
        "fedsa/v1/d/other",
        "fedsa/v1//state",
        "fedsa/v1/d/req",
        "fedsa/v1/d/req/",
        "fedsa/v1/d/req/a/b",
        "fedsa/v1/d/req/A",
        "fedsa/v1/d/rsp/",
        "fedsa/v1/d/rsp/+",
        "fedsa/v2/d/state",
        "FEDSA/v1/d/state",
        "/fedsa/v1/d/state",
    ],
)
def test_a_topic_of_another_contract_is_not_parsed(topic: str) -> None:
    assert topics.parse(topic) is None


@given(st.text())
def test_parse_never_raises(topic: str) -> None:
    for text in (topic, f"fedsa/v1/{topic}", f"fedsa/v1/d/req/{topic}"):
        parsed = topics.parse(text)
        assert parsed is None or str(parsed) == text


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fedsa/v1/d/state",
        "fedsa/v1/other/state",
        "fedsa/v1/d/req/describe",
        "fedsa/v1/ada/rsp/other",
        "fedsa/v1/ada/rsp/d/x",
        "fedsa/v1/+/rsp/d",
        "fedsa/v1/#",
        "home/lamp",
    ],
)
def test_a_device_answers_nowhere_but_under_its_own_name(topic: str) -> None:
    assert not topics.may_answer_to(topic, "d")


def test_it_may_answer_a_coordinator() -> None:
    assert topics.may_answer_to("fedsa/v1/ada/rsp/d", "d")
