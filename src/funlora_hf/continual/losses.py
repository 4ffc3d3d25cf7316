"""Losses that stay on the device until several are read at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .guarded_steps import Outcome


class StepLoss(NamedTuple):
    """A step, counted from 0, the loss of each of its batches, and what became of it."""

    step: int
    parts: list[float]
    outcome: Outcome

    @property
    def mean(self) -> float:
        """Over the batches of the step."""
        return sum(part / len(self.parts) for part in self.parts)


class PendingLosses:
    """Keeps the losses of steps, in order, until they are read: to read one is to wait for the device.

    Args:
        every: steps after which they are due to be read, >= 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._pending: list[tuple[int, Sequence[torch.Tensor], torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def due(self) -> bool:
        """Whether enough steps wait."""
        return len(self) >= self.every

    def add(self, step: int, parts: Sequence[torch.Tensor], outcome: torch.Tensor) -> None:
        """Keep a step's outcome, a scalar, and the loss of each of its batches: at least one scalar, without a graph."""
        self._pending.append((step, parts, outcome))

    def read(self) -> list[StepLoss]:
        """All that wait, oldest first; none wait afterwards."""
        waiting, self._pending = self._pending, []
        if not waiting:
            return []
        values = iter(torch.stack([scalar for _, parts, outcome in waiting for scalar in (*parts, outcome)]).tolist())
        return [
            StepLoss(step, [next(values) for _ in parts], Outcome(int(next(values)))) for step, parts, _ in waiting
        ]
