from __future__ import annotations

from pathlib import Path

import pytest

from edge_teacher.contract.errors import UsageError
from edge_teacher.rpc.address import parse_broker
from tests.brokers import Authority


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://h", "h", 1883, False),
        ("mqtts://h", "h", 8883, True),
        ("mqtt://h:9/", "h", 9, False),
        ("mqtts://10.0.0.1:8884", "10.0.0.1", 8884, True),
        ("mqtt://[::1]:1884", "::1", 1884, False),
        ("MQTT://h", "h", 1883, False),
    ],
)
def test_an_address(url: str, host: str, port: int, tls: bool) -> None:
    found = parse_broker(url)
    assert (found.host, found.port, found.tls) == (host, port, tls)
    assert parse_broker(str(found)) == found


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "h:1883",
        "http://h",
        "mqtt://",
        "mqtt://:1883",
        "mqtt:h",
        "mqtt://h:0",
        "mqtt://h:65536",
        "mqtt://h:x",
        "mqtt://h:-1",
        "mqtt://h/topic",
        "mqtt://h?x=1",
        "mqtt://h#x",
        "mqtt://ada:secret@h",
        "mqtt://[::1",
    ],
)
def test_anything_else_is_a_usage_error_that_says_how_to_write_it(url: str) -> None:
    with pytest.raises(UsageError, match="write mqtt://HOST:PORT"):
        parse_broker(url)


def test_a_password_does_not_get_into_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        parse_broker("mqtt://ada:secret@h")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("option", ["ca", "certificate", "key"])
def test_tls_files_without_tls_are_not_silently_ignored(option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mqtts"):
        parse_broker("mqtt://h", **{option: tmp_path / "file"})


def test_a_key_without_its_certificate_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="certificate"):
        parse_broker("mqtts://h", key=tmp_path / "key")


class TestContext:
    def test_none_without_tls(self) -> None:
        assert parse_broker("mqtt://h").ssl_context() is None

    def test_verifies_the_broker_and_shows_the_certificate(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        certificate, key = authority.issue("d1")
        context = parse_broker(
            "mqtts://h", ca=authority.certificate, certificate=certificate, key=key
        ).ssl_context()
        assert context is not None
        assert context.check_hostname
        assert len(context.get_ca_certs()) == 1

    @pytest.mark.parametrize("broken", ["ca", "certificate", "key"])
    @pytest.mark.parametrize("content", [None, b"", b"garbage"])
    def test_a_file_that_cannot_be_used_is_named(
        self, tmp_path: Path, broken: str, content: bytes | None
    ) -> None:
        authority = Authority(tmp_path)
        certificate, key = authority.issue("d1")
        files = {"ca": authority.certificate, "certificate": certificate, "key": key}
        files[broken] = tmp_path / "broken"
        if content is not None:
            files[broken].write_bytes(content)
        with pytest.raises(UsageError, match="broken"):
            parse_broker("mqtts://h", **files).ssl_context()
