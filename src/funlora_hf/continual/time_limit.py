"""Stop a run after a time, on machines that are available for a limited time."""

from __future__ import annotations

from time import monotonic


class TimeLimitReached(Exception):
    """The time of a run is over; it has stopped and can be resumed."""


class TimeLimit:
    """A time limit that starts when it is created and is over after so many minutes; None: never."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._started = monotonic()

    def __bool__(self) -> bool:
        """Return whether there is a limit."""
        return self.minutes is not None

    @property
    def is_over(self) -> bool:
        """Return whether the time is over."""
        return self.minutes is not None and monotonic() - self._started >= 60 * self.minutes

    def reached(self, where: str) -> TimeLimitReached:
        """Return the error to raise; `where` says at which point the run stops."""
        return TimeLimitReached(
            f"`time_limit_minutes` {self.minutes:g} is over: stopped {where}. What is learned is kept; start it again "
            "with the same arguments and --resume_from_checkpoint latest to go on."
        )
