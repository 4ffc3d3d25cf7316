"""SIGTERM, by which batch systems and launchers ask a process to end before they kill it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


# As a shell reports a process that SIGTERM has ended.
EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The run has stopped after SIGTERM and can be resumed; ends the process with code 143 unless it is caught."""

    def __init__(self, where: str) -> None:
        super().__init__(EXIT_CODE)
        self.where = where

    def __str__(self) -> str:
        return (
            f"SIGTERM: stopped {self.where}. What is learned is kept; start it again with the same arguments and "
            "--resume_from_checkpoint latest to go on."
        )


class Termination:
    """
    A context in which SIGTERM raises `Terminated` in the main thread: at once, or, in a block of `deferred`, when that asks for
    it. All files of a run appear whole or not at all, so that it may stop anywhere.

    Args:
        grace (`float`):
            Seconds after the signal until the process is ended. Batch systems rarely wait longer than 10, and Python needs some of
            these to unload its libraries once a run has stopped.
    """

    def __init__(self, grace: float = 7.0) -> None:
        self.requested = False
        self._grace = grace
        self._deferred = False
        self._previous: Any = None
        self._guard: threading.Timer | None = None

    def __enter__(self) -> Termination:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)
        if self._guard is not None:
            self._guard.cancel()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that often looks at `requested` itself, as the code after it does, and stops where little is lost."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # a launcher and a batch system may both send it
        self.requested = True
        self._guard = threading.Timer(self._grace, os._exit, [EXIT_CODE])
        self._guard.daemon = True
        self._guard.start()
        if not self._deferred:
            raise Terminated("outside the steps of a phase")
