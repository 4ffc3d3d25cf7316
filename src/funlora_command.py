"""The command `funlora`. Beside the package, so that Ctrl-C ends it in one line while the package and torch are imported."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Run the command; see `funlora_hf.cli.main`."""
    before = signal.signal(signal.SIGINT, _stop)
    from funlora_hf.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _stop(number: int, frame: FrameType | None) -> None:
    # At once: libraries catch exceptions while they are imported, and nothing is written yet.
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)
