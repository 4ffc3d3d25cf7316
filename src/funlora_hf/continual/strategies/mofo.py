"""MoFO: Adam that changes only the entries of each tensor with the largest momentum.

Source: T2I-ConBench, arXiv 2505.16875, baseline mofo: entries of each tensor by |m| and the share [code]; at least one entry, and
exactly the share [ours].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from ...utils.field_types import Range
from ..learning import Phase, Trainable
from .all_weights import AllWeights
from .finetune import Finetune
from .merging_rules import RuleOptions


@dataclass
class MofoOptions(RuleOptions):
    """
    Args:
        share: of the entries of a tensor, those that a step changes; 1 is Adam [code: 0.5].
    """

    share: Annotated[float, Range(0, 1, above=True)] = 0.5


class MofoAdamW(torch.optim.AdamW):
    """AdamW whose step changes only some entries of a tensor: those with the largest |m|, and so also the largest |m_hat|.

    The moments of all entries are updated. In a fused step that `found_inf` skips, nothing changes, as in AdamW.

    Args:
        groups: parameter groups.
        filtered: the parameters of which only some entries are changed.
        share: of a tensor's n entries, ceil(share n) are changed, at least one.
        **adamw: arguments of AdamW.
    """

    def __init__(self, groups: Any, *, filtered: Collection[nn.Parameter], share: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._filtered, self._share = tuple(filtered), share

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [parameter.clone() for parameter in self._filtered]
        loss = super().step(closure)
        for parameter, old in zip(self._filtered, before, strict=True):
            if (state := self.state.get(parameter)) is not None:
                parameter.copy_(torch.where(largest(state["exp_avg"], self._share), parameter, old))
        return loss


class MofoRule(AllWeights):
    """Trains by `MofoAdamW`, whose state is new in each task; rows of classes and tokens are trained by plain AdamW."""

    name, options_class = "mofo", MofoOptions
    copies = 1
    _filtered: tuple[nn.Parameter, ...] = ()

    def protect(self, phase: Phase, trainable: Trainable, weights: Mapping[str, nn.Parameter]) -> None:
        self._filtered = tuple(weights.values())

    def make_optimizer(self, phase: Phase, trainable: Trainable, **adamw: Any) -> torch.optim.Optimizer:
        return MofoAdamW(trainable.groups(), filtered=self._filtered, share=self.options.share, **adamw)

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._filtered = ()


class Mofo(MofoRule, Finetune):
    """Trains the whole U-Net, in each step the entries with the largest momentum."""


def largest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return a mask of the ceil(share n) entries with the largest absolute values, at least one, of the shape of `values`."""
    flat = values.abs().flatten()
    # Rounded first: 0.07 * 100 is a bit more than 7.
    count = max(1, math.ceil(round(share * len(flat), 6)))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count, sorted=False).indices] = True
    return mask.view(values.shape)
