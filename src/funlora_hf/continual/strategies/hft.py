"""Half fine-tuning: in each task, part of every block's tensors stay as they are.

Source: T2I-ConBench, arXiv 2505.16875, baseline hft: tensors, not entries, drawn anew for each task [code]; what a block is [ours].
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...utils.field_types import Share
from ...utils.seeds import generator_for
from ..learning import Phase, Trainable
from .all_weights import AllWeights
from .finetune import Finetune
from .merging_rules import RuleOptions


@dataclass
class HftOptions(RuleOptions):
    """
    Args:
        share: of every block's tensors, those that a task does not train; 0 is plain fine-tuning [code: 0.5].
    """

    share: Share = 0.5


class HftRule(AllWeights):
    """Freezes a share of every block's tensors, drawn for each task."""

    name, options_class = "hft", HftOptions

    def protect(self, phase: Phase, trainable: Trainable, weights: Mapping[str, nn.Parameter]) -> None:
        for block, names in blocks(weights).items():
            # Rounded before it is cut: 0.29 * 100 is a bit less than 29.
            count = int(round(self.options.share * len(names), 6))
            generator = generator_for(self.setting.training.seed, self.name, phase.name, block)
            for index in torch.randperm(len(names), generator=generator)[:count].tolist():
                trainable.parameters.pop(names[index]).requires_grad_(False)


class Hft(HftRule, Finetune):
    """Trains the U-Net but for the frozen tensors."""


def blocks(names: Collection[str]) -> dict[str, list[str]]:
    """Group the names of a model's parameters by block: the innermost module that holds two layers or more.

    A layer is a module with parameters of its own. So a residual block, an attention, a feed-forward net and a transformer block (for
    its norms) are blocks, and the model itself is one for layers in no other.

    Returns:
        The names of each block's parameters, in their order; "" is the model.
    """
    layers = {name.rpartition(".")[0] for name in names}
    held = Counter(layer[:end] for layer in layers for end, letter in enumerate(layer) if letter == ".")
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        block = name.rpartition(".")[0]
        while block and held[block] < 2:
            block = block.rpartition(".")[0]
        found[block].append(name)
    return dict(found)
