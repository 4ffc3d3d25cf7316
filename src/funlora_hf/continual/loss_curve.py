"""A summary of the losses of a phase."""

from __future__ import annotations

import json
import math


class LossCurve:
    """Means of the loss over equal parts of the steps of a phase, without steps whose loss is not finite."""

    MOST_POINTS = 50

    def __init__(self, steps: int) -> None:
        self.steps = steps
        count = min(steps, self.MOST_POINTS)
        self._sums, self._counts = [0.0] * count, [0] * count

    def add(self, step: int, loss: float) -> None:
        """Count the loss of a step, numbered from 0."""
        if math.isfinite(loss):
            point = step * len(self._sums) // self.steps
            self._sums[point] += loss
            self._counts[point] += 1

    def means(self) -> list[float | None]:
        """Return the mean of each part, in order; None for a part without a loss."""
        return [sum_ / count if count else None for sum_, count in zip(self._sums, self._counts, strict=True)]

    def state(self) -> str:
        """Return the state for a checkpoint, as JSON."""
        return json.dumps([self._sums, self._counts])

    def load(self, state: str) -> None:
        """Load what `state` gave."""
        self._sums, self._counts = json.loads(state)
