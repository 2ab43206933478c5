from __future__ import annotations

import pytest

from tests.edge_teacher.runtime.verdict import VERDICT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests with a GPU measured: for the person who ran them, and for a file to send."""
    if VERDICT.lines:
        terminalreporter.section("GPU verdict")
        for line in VERDICT.lines:
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"the same as JSON, to send: {VERDICT.write()}")
