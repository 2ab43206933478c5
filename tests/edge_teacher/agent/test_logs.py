from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import pytest

from edge_teacher.agent.logs import logging_to, set_level

log = logging.getLogger("edge_teacher.test")


def logged(form: str, level: str = "info", **more: object) -> list[str]:
    stream = io.StringIO()
    with logging_to(form, level, stream=stream, **more):  # type: ignore[arg-type]
        log.debug("unseen")
        log.info("it serves %s", 'a "teacher"')
        try:
            {}["a bug\nof two lines"]
        except KeyError:
            log.exception("it failed")
    log.error("after the end")
    return stream.getvalue().splitlines()


def test_json_is_one_object_per_line_whatever_is_said() -> None:
    first, second = map(json.loads, logged("json", fields={"device": "d1"}))
    assert (first["level"], first["message"]) == ("info", 'it serves a "teacher"')
    assert (first["device"], first["logger"]) == ("d1", "edge_teacher.test")
    assert first["time"].endswith("+00:00")
    assert first["up_s"] >= 0
    assert "exception" not in first
    assert second["level"] == "error"
    assert "KeyError: 'a bug" in second["exception"]
    assert "\n" in second["exception"]


def test_text_has_the_time_and_the_level() -> None:
    lines = logged("text")
    assert lines[0].endswith('INFO it serves a "teacher"')
    assert lines[0][:2] == "20"


def test_levels_are_kept_and_can_be_changed_meanwhile() -> None:
    stream = io.StringIO()
    with logging_to("text", "error", stream=stream):
        log.info("too little")
        set_level("debug")
        log.debug("enough")
    assert "too little" not in stream.getvalue()
    assert "enough" in stream.getvalue()


def test_a_message_that_quotes_too_much_is_cut() -> None:
    stream = io.StringIO()
    with logging_to("json", "info", stream=stream):
        log.info("x" * 1_000_000)
    assert len(stream.getvalue()) < 20_000


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_journal_is_told_priorities_and_keeps_the_time(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        with logging_to(form, "info", stream=stream):  # type: ignore[arg-type]
            log.info("fine")
            log.warning("two\nlines")
        lines = (tmp_path / "journal").read_text().splitlines()
    if form == "text":
        assert lines == ["<6>INFO fine", "<4>WARNING two", "<4>lines"]
    else:
        assert [line[:3] for line in lines] == ["<6>", "<4>"]
        assert json.loads(lines[1][3:])["message"] == "two\nlines"


def test_another_stream_than_the_journal_s_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    assert not logged("text")[0].startswith("<")
