"""What strategies of classes and of concepts share that train all weights of a generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..learning import LearningStrategy, Phase, Trainable


class AllWeights(LearningStrategy):
    """All weights are trained, task after task; a subclass protects what was learned, in both worlds alike."""

    copies: ClassVar[int] = 0
    """How many more copies of the weights training holds, beside gradient, moments and average."""
    options: Any

    def protect(self, phase: Phase, trainable: Trainable, weights: Mapping[str, nn.Parameter]) -> None:
        """Called when a task begins, with the parameters that earlier tasks have trained, too: all but rows of classes or tokens.

        Not called in the phase of the base. Parameters have their start values: a checkpoint is loaded later.
        """
