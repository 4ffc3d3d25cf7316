"""Show the progress of long loops: a bar on a terminal, otherwise a line in the log every 30 seconds."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress(tqdm):
    """A bar of tqdm. If stderr is not a terminal, it logs its state every 30 seconds, since a bar would be one endless line."""

    def __init__(self, total: int, description: str, **options: Any) -> None:
        # A notebook has no terminal, but shows bars.
        self._logs = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        every: dict[str, Any] = {"mininterval": 1.0}
        if self._logs:
            text = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"
            every = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "bar_format": text}
            every["file"] = io.StringIO()
        super().__init__(total=total, desc=description, leave=False, **every, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._logs:
            super().display(msg, pos)
        elif msg is None:
            logger.info("%s", str(self))


def duration(seconds: float) -> str:
    """Return a time as text in a suitable unit: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
