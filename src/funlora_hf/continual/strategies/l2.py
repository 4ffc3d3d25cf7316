"""Fine-tuning with a penalty on the distance to the weights after the previous task.

Source: T2I-ConBench, arXiv 2505.16875, baseline l2norm [code].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from ...utils.field_types import Range
from ..learning import Phase, Trainable
from .all_weights import AllWeights
from .finetune import Finetune
from .merging_rules import RuleOptions


@dataclass
class L2Options(RuleOptions):
    """
    Args:
        penalty: w; 0 is plain fine-tuning [code: 1e-3].
    """

    penalty: Annotated[float, Range(0, 1e12)] = 1e-3


class L2Rule(AllWeights):
    """Pulls all weights towards their values before the task: + w sum (theta - theta_{t-1})^2."""

    name, options_class = "l2", L2Options
    copies = 1
    _anchors: tuple[tuple[nn.Parameter, torch.Tensor], ...] = ()

    def protect(self, phase: Phase, trainable: Trainable, weights: Mapping[str, nn.Parameter]) -> None:
        self._anchors = tuple((weight, weight.detach().clone()) for weight in weights.values())

    def penalty(self) -> torch.Tensor | float:
        terms = [(weight - start).square().sum() for weight, start in self._anchors]
        return self.options.penalty * torch.stack(terms).sum() if terms else 0.0

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._anchors = ()


class L2(L2Rule, Finetune):
    """Trains the whole U-Net, and pulls it towards its weights before the task."""
