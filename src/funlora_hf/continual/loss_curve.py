"""What is kept of the losses of a phase."""

from __future__ import annotations

import json
import math


class LossCurve:
    """Means of the loss over equal parts of the steps of a phase; those whose loss is not finite are left out."""

    MOST_POINTS = 50

    def __init__(self, steps: int) -> None:
        self.steps = steps
        count = min(steps, self.MOST_POINTS)
        self._sums, self._counts = [0.0] * count, [0] * count

    def add(self, step: int, loss: float) -> None:
        """Count the loss of a step, from 0."""
        if math.isfinite(loss):
            point = step * len(self._sums) // self.steps
            self._sums[point] += loss
            self._counts[point] += 1

    def means(self) -> list[float | None]:
        """The mean of each part, in order; None for a part without a loss."""
        return [sum_ / count if count else None for sum_, count in zip(self._sums, self._counts, strict=True)]

    def state(self) -> str:
        """What a checkpoint keeps, as JSON."""
        return json.dumps([self._sums, self._counts])

    def load(self, state: str) -> None:
        """The inverse of `state`."""
        self._sums, self._counts = json.loads(state)
