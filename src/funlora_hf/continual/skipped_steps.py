"""The count of optimiser steps that were skipped since loss or gradient was not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum


# fp16 starts with gradients 2^16 times too large and halves that at each that overflows, so that many may come in a row.
HALVINGS = 16


class Outcome(IntEnum):
    """What became of a step."""

    DONE = 0
    NO_GRADIENT = 1
    NO_LOSS = 2


@dataclass
class SkippedSteps:
    """
    Args:
        total: skipped steps of the phase, with those by which fp16 finds its scale.
        in_row: steps skipped since the last that was done, without those.
        rescaled_in_row: steps since then that fp16 skipped to halve its scale.
    """

    total: int = 0
    in_row: int = 0
    rescaled_in_row: int = 0

    def add(self, outcome: Outcome, *, scaled: bool) -> None:
        """Count a step; `scaled` if the gradient was that of a scaled loss, whose overflow is no fault of the phase."""
        if outcome is Outcome.DONE:
            self.in_row = self.rescaled_in_row = 0
            return
        self.total += 1
        if outcome is Outcome.NO_GRADIENT and scaled:
            self.rescaled_in_row += 1
        else:
            self.in_row += 1

    def exceed(self, limit: int) -> bool:
        """Whether more than `limit` in a row were skipped."""
        return self.in_row > limit or self.rescaled_in_row > limit + HALVINGS

    def numbers(self) -> dict[str, str]:
        """As a checkpoint keeps them."""
        return {f"skipped_{name}": str(value) for name, value in asdict(self).items()}

    def load(self, numbers: Mapping[str, str]) -> None:
        """The inverse of `numbers`; what a checkpoint does not have is 0."""
        for name in asdict(self):
            setattr(self, name, int(numbers.get(f"skipped_{name}", 0)))
