"""Where `fedsa` begins: says what is missing where only the device's part is installed."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from coordinator.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"fedsa: {error.name} is not installed here: this is the workstation's command, and comes "
            "with pip install 'fedsa-edge[coordinator]', for Python 3.11 or newer",
            file=sys.stderr,
        )
        return 2
    return run()
