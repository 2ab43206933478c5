import contextlib

import pytest

from coordinator.terminal import TerminalProgress, interruption


def test_an_interrupt_that_a_library_swallowed_is_raised_by_the_next_step() -> None:
    with TerminalProgress() as progress:
        progress.begin("ask", 3)
        with contextlib.suppress(BaseException):  # as a library might
            interruption.ask()
        with pytest.raises(KeyboardInterrupt):
            progress.advance()
        progress.advance()  # heeded once
        progress.end()
