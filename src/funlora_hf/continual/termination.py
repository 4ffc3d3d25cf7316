"""Stop at SIGTERM, with which batch systems and launchers end a process, and at SIGINT, which is Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Within so many seconds, a second SIGINT counts as the first: a terminal and a launcher both pass it on.
SAME_SIGNAL = 1.0


class Terminated(SystemExit):
    """The run has stopped after a signal and can be resumed. Unless it is caught, it ends the process with the exit code by which a
    shell reports the signal: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, where: str, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
        self.where, self.signal = where, signal.Signals(number)

    def __str__(self) -> str:
        return (
            f"{self.signal.name}: stopped {self.where}. What is learned is kept; start it again with the same arguments and "
            "--resume_from_checkpoint latest to go on."
        )


class Termination:
    """A context in which SIGTERM and SIGINT raise `Terminated` in the main thread: at once, or, in a block of `deferred`, when the
    block asks for it. All files of a run appear whole or not at all, so the run may stop anywhere. A second SIGINT ends the
    process at once, a second SIGTERM changes nothing. A signal that the process ignored at its start stays ignored, as SIGINT in
    the background of a script.

    Args:
        grace (`float`): Seconds after SIGTERM until the process ends. Batch systems rarely wait longer than 10, and Python
            needs some of these to unload its libraries when a run has stopped.
    """

    def __init__(self, grace: float = 7.0) -> None:
        self.number: int | None = None
        self._grace = grace
        self._deferred = False
        self._received = 0.0
        self._previous: dict[int, Any] = {}
        self._guard: threading.Timer | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def __enter__(self) -> Termination:
        watched = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._guard is not None:
            self._guard.cancel()

    def error(self, where: str) -> Terminated:
        """Return the error to raise for the signal that has come, here or in another process."""
        return Terminated(where, self.number or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Mark a block that checks `requested` often, as does the code after it, and stops where little is lost."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == self.number == signal.SIGINT and now - self._received > SAME_SIGNAL:
            os._exit(128 + number)
        if number == signal.SIGTERM and self._guard is None:
            self._guard = threading.Timer(self._grace, os._exit, [128 + number])
            self._guard.daemon = True
            self._guard.start()
        if self.requested:
            return  # a launcher, a terminal and a batch system may all send one
        self.number, self._received = number, now
        if not self._deferred:
            raise self.error("outside the steps of a phase")
