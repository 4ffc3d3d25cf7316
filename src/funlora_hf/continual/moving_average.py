"""The moving average of what a phase trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.training_utils import EMAModel


class MovingAverage(EMAModel):
    """
    diffusers' average, whose warm-up can be switched off.

    With it, the decay after s averaged steps is at most (1 + s) / (10 + s), whatever `decay` is, which diffusers always does. Without
    it, `decay` holds from the first averaged step.

    Args:
        parameters: what is averaged.
        decay: in [0, 1].
        warmup: whether there is a warm-up.
        start: steps before averaging starts, after each of which the average is the parameters themselves.
        foreach: take all parameters at once.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], *, decay: float, warmup: bool, start: int, foreach: bool
    ) -> None:
        super().__init__(parameters, decay=decay, update_after_step=start, foreach=foreach)
        self.warmup = warmup

    def get_decay(self, optimization_step: int) -> float:
        """The decay in a step, which counts from 1."""
        if self.warmup or optimization_step <= self.update_after_step:
            return super().get_decay(optimization_step)
        return self.decay
