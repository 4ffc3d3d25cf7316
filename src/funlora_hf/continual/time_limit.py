"""When a run has to stop by itself, for machines that are available for a limited time."""

from __future__ import annotations

from time import monotonic


class TimeLimitReached(Exception):
    """The time of a run is over; it has stopped and can be resumed."""


class TimeLimit:
    """A time limit that starts when it is made, and is over after so many minutes; None: never."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._started = monotonic()

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return self.minutes is not None

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.minutes is not None and monotonic() - self._started >= 60 * self.minutes

    def reached(self, where: str) -> TimeLimitReached:
        """The error to raise; `where` says at which point."""
        return TimeLimitReached(
            f"`time_limit_minutes` {self.minutes:g} is over: stopped {where}. What is learned is kept; start it again "
            "with the same arguments and --resume_from_checkpoint latest to go on."
        )
