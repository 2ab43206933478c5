"""What an agent makes of a file, flags and credentials, and what it says of a wrong one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
import pytest

from edge_teacher.agent.settings import LIVE, File, read_file, source
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.limits import Limits
from tests.examples import ROOT

WHOLE = """
device = "jetson-7"
broker = "mqtts://broker.lan"
ca = "/etc/fedsa/ca.crt"
certificate = "device.crt"
key = "device.key"
bundle = "teacher.fedsa"
owner_keys = ["owner.pub"]
coordinator_keys = ["ada.pub", "/keys/bob.pub"]
allow = ["ada", "bob"]
state = "state"
threads = 4
telemetry_s = 2
metrics_port = 9464
tegrastats = "/usr/bin/tegrastats"
stuck_after_s = 120.5
log = "json"
log_level = "warning"
memory_bytes = 1000000000

[limits]
max_queued_requests = 16
"""
NEEDED = """
device = "d1"
broker = "mqtt://127.0.0.1"
bundle = "teacher.fedsa"
owner_keys = ["owner.pub"]
state = "state"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_everything_a_file_may_say(tmp_path: Path) -> None:
    found = source(File(), write(tmp_path, WHOLE), {}).read()
    assert (found.device, str(found.address)) == ("jetson-7", "mqtts://broker.lan:8883")
    # A relative path starts at the file, an absolute one does not.
    assert found.address.ca == Path("/etc/fedsa/ca.crt")
    assert found.address.certificate == tmp_path / "device.crt"
    assert found.coordinator_keys == (tmp_path / "ada.pub", Path("/keys/bob.pub"))
    assert found.allow == {"ada", "bob"}
    assert (found.threads, found.telemetry_s, found.stuck_after_s) == (4, 2, 120.5)
    assert (found.metrics_port, found.log, found.log_level) == (9464, "json", "warning")
    assert found.limits == Limits(max_queued_requests=16)
    assert found.memory_bytes == 1_000_000_000
    assert found.tegrastats == "/usr/bin/tegrastats"


def test_flags_go_before_the_file_and_defaults_behind_it(tmp_path: Path) -> None:
    flags = File(device="d2", bundle="other.fedsa", allow=("ada",))
    found = source(flags, write(tmp_path, NEEDED), {}).read()
    assert (found.device, found.bundle, found.allow) == ("d2", Path("other.fedsa"), {"ada"})
    assert found.state == tmp_path / "state"
    assert (found.threads, found.log, found.limits) == (1, "text", Limits())
    assert found.metrics_port is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("device = ", "is no TOML: Invalid value"),
        ("alow = ['ada']", "has the key 'alow', which is none: there are allow, broker"),
        ("[limits]\nmax_images = 3", "has the key 'limits.max_images', which is none"),
        ("threads = 'two'", "is wrong: threads: expected `int`, got `str`"),
        ("threads = 0", "is wrong: threads: expected `int` >= 1"),
        ("metrics_port = 70000", "is wrong: metrics_port: expected `int` <= 65535"),
        ("telemetry_s = 0.0", "is wrong: telemetry_s: expected `float` >= 0.1"),
        ("log = 'xml'", "is wrong: log: invalid enum value 'xml'"),
        ("allow = 'ada'", "is wrong: allow: expected `array`, got `str`"),
        ("limits = 3", "is wrong: limits: expected `object`, got `int`"),
        ("[limits]\nmax_queued_requests = 0", "max_queued_requests is 0, and must be above 0"),
        ("[limits]\nanswer_cache_s = -1.0", "answer_cache_s is -1.0, and must be above 0"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_file_and_the_key(
    text: str, sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path, NEEDED + text if not text.startswith("device") else text)
    with pytest.raises(UsageError) as caught:
        source(File(), path, {}).read()
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["device", "broker", "bundle", "owner_keys", "state"])
def test_what_must_be_said_somewhere(name: str, tmp_path: Path) -> None:
    text = "\n".join(line for line in NEEDED.splitlines() if not line.startswith(name))
    with pytest.raises(UsageError, match=f"nothing says {name}: give --"):
        source(File(), write(tmp_path, text), {}).read()


def test_names_and_addresses_are_checked_as_flags_are(tmp_path: Path) -> None:
    for text, sentence in (
        (NEEDED.replace('"d1"', '"a/b"'), "'a/b' is no usable id"),
        (NEEDED.replace("mqtt://", "http://"), "write mqtt://HOST:PORT"),
        (NEEDED + 'allow = ["+"]', r"'\+' is no usable id"),
    ):
        with pytest.raises(UsageError, match=sentence):
            source(File(), write(tmp_path, text), {}).read()


def test_systemd_s_credentials_fill_what_nothing_names(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    for name in ("ca.crt", "device.crt", "device.key"):
        (folder / name).touch()
    environment = {"CREDENTIALS_DIRECTORY": str(folder)}
    tls = NEEDED.replace("mqtt:", "mqtts:")
    address = source(File(), write(tmp_path, tls), environment).read().address
    assert (address.ca, address.certificate, address.key) == (
        folder / "ca.crt",
        folder / "device.crt",
        folder / "device.key",
    )
    named = source(File(ca="mine.crt"), write(tmp_path, tls), environment).read().address
    assert (named.ca, named.key) == (Path("mine.crt"), folder / "device.key")
    # Without TLS they are not used, and a broker without TLS is no error for their being there.
    assert source(File(), write(tmp_path, NEEDED), environment).read().address.ca is None
    (folder / "ca.crt").unlink()
    assert source(File(), write(tmp_path, tls), environment).read().address.ca is None


def test_a_reload_knows_what_it_can_take(tmp_path: Path) -> None:
    path = write(tmp_path, NEEDED)
    told = source(File(), path, {})
    before = told.read()
    assert before.changed(told.read()) == (set(), set())
    path.write_text(NEEDED.replace("127.0.0.1", "elsewhere") + "threads = 2\nallow = ['ada']\n")
    after = told.read()
    assert before.changed(after) == ({"allow"}, {"broker", "threads"})
    taken = before.with_live_of(after)
    assert (taken.allow, taken.threads, taken.address) == ({"ada"}, 1, before.address)
    # What was not taken is said again at the next reload.
    assert taken.changed(after) == (set(), {"broker", "threads"})


def test_python_3_10_reads_it_with_tomli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)  # it came with 3.11
    assert read_file(write(tmp_path, NEEDED)).device == "d1"
    assert "tomli" in sys.modules


def test_the_document_explains_every_key_and_no_other() -> None:
    text = (ROOT / "docs" / "agent.md").read_text()
    keys = {field.name for field in msgspec.structs.fields(File)}
    limits = {f"limits.{field.name}" for field in msgspec.structs.fields(Limits)}
    rows = set(re.findall(r"^\| `([a-z_.0-9]+)` \|.*\| (?:yes|no) \|", text, re.MULTILINE))
    assert rows == keys - {"limits"} | limits
    live = set(re.findall(r"^\| `([a-z_]+)[`.].*\| yes \|", text, re.MULTILINE))
    assert live == set(LIVE)
