"""The command `funlora`. Beside the package, whose import takes seconds: it answers here what needs no model, and Ctrl-C is one line."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType


def main() -> int:
    """Run the command; see `funlora_hf.cli.main`."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, _stop)
    if sys.argv[1:] == ["--version"]:
        print(f"funlora {version('funlora-hf')}")
        return 0
    if sys.argv[1:] == ["recipes"]:
        spec = find_spec("funlora_hf")  # finds the package without importing it
        for folder in (spec and spec.submodule_search_locations) or ():
            print(*sorted(path.stem for path in Path(folder, "recipes").glob("*.yaml")), sep="\n")
        return 0
    from funlora_hf.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _stop(number: int, frame: FrameType | None) -> None:
    # At once: libraries catch exceptions while they are imported, and nothing is written yet.
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)
