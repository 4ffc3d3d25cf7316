"""Orthogonal Adaptation: concepts are trained apart, each with an A of its own that is fixed and orthogonal to the others', and summed.

Source: arXiv 2312.02432: fixed and trained factor, two constructions of the fixed one, merging by a sum [text]; rank, layers and weight
[recall]. "dealt" rows are [ours]. The authors' tokens are layer-wise; here they are plain rows [ours]. No code of the authors is public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from torch import nn

from ...continual.learning import Phase, Trainable
from ...continual.strategies.low_rank import get_pairs, set_pairs
from ...continual.strategies.merging_rules import Kept, MergingRule, Pairs, RuleOptions, only
from ...continual.strategies.weight_changes import Pair, product
from ...utils.field_types import Range, one_of
from ...utils.seeds import generator_for
from .base import ConceptSetting, Rates
from .one_model import LowRank


@dataclass
class OrthogonalAdaptationOptions(RuleOptions):
    """
    Args:
        basis: the rows of a concept's A. "dealt": rows of one orthogonal matrix that no other concept has, so that A_i A_j^T = 0
            [ours]; "random": rows of it drawn for each concept, who may share some [text]; "gaussian": N(0, 1 / inputs) [text].
        merge_weight: lambda, by which each product is multiplied in the sum. The paper has 0.6 [recall].
    """

    basis: Annotated[str, one_of("dealt", "random", "gaussian")] = "dealt"
    merge_weight: Annotated[float, Range(0, 10, above=True)] = 1.0


class OrthogonalRule(MergingRule):
    """Keeps B of each task, trained on the base; the generator has the weighted sum of the products."""

    name, grows = "orthogonal_adaptation", True
    fixed: Callable[[str, int], torch.Tensor]
    """Computes A of a layer and a task, from 0."""

    def deltas(self, kept: Kept) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for number in range(tasks_in(kept)):
            for layer, B in only(kept, f"B_{number}").items():
                change = product(Pair(self.fixed(layer, number).to(B), B))
                sums[layer] = sums.get(layer, 0) + self.options.merge_weight * change
        return sums

    def training_deltas(self, kept: Kept) -> dict[str, torch.Tensor]:
        return {}

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        return {**kept, **{f"{layer}/B_{tasks_in(kept)}": pair.B for layer, pair in learned.items()}}


class OrthogonalAdaptation(LowRank):
    """Trains B of each task on the untouched base."""

    name, rule_class = OrthogonalRule.name, OrthogonalRule
    options_class = OrthogonalAdaptationOptions
    rates = Rates(2.4e-3, 1e-5)
    default_layers = "attention"

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        cast("OrthogonalRule", self.rule).fixed = self.fixed
        self._bases: dict[int, torch.Tensor] = {}

    def check(self) -> None:
        super().check()
        tasks = len(self.setting.tasks)
        for layer, (_, inputs) in self._shapes().items():
            needed = self.rank * (tasks if self.options.basis == "dealt" else 1)
            if self.options.basis != "gaussian" and needed > inputs:
                raise ValueError(
                    f"`rank` is {self.rank}, so {tasks} concepts with basis={self.options.basis} need {needed} orthogonal rows, but the "
                    f"layer {layer} has {inputs} inputs: lower the rank, or take basis=gaussian."
                )

    def build(self, phase: Phase) -> Trainable:
        self._number = self.task_of(phase).index
        return super().build(phase)

    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        super().adapted({})
        denoiser = self.model.denoiser
        pairs = get_pairs(denoiser)
        set_pairs(denoiser, {layer: Pair(self.fixed(layer, self._number), B) for layer, (_, B) in pairs.items()})
        for name, parameter in denoiser.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}

    def fixed(self, layer: str, number: int) -> torch.Tensor:
        """Return A of a layer and a task, `(rank, inputs)`; equal for layers with as many inputs, unless it is Gaussian."""
        seed, inputs = self.setting.training.seed, self._shapes()[layer][1]
        if self.options.basis == "gaussian":
            return (
                torch.randn(self.rank, inputs, generator=generator_for(seed, self.name, number, layer)) / inputs**0.5
            )
        if inputs not in self._bases:
            gaussian = torch.randn(
                inputs, inputs, generator=generator_for(seed, self.name, inputs), dtype=torch.float64
            )
            self._bases[inputs] = torch.linalg.qr(gaussian).Q
        rows = torch.arange(number * self.rank, (number + 1) * self.rank)
        if self.options.basis == "random":
            rows = torch.randperm(inputs, generator=generator_for(seed, self.name, "rows", number, inputs))[
                : self.rank
            ]
        return self._bases[inputs][rows].float()

    def trained_numbers(self) -> int:
        return self.rank * sum(outputs for outputs, _ in self._shapes().values())


def tasks_in(kept: Mapping[str, Any]) -> int:
    """Return the number of tasks whose `layer/B_<number>` are kept."""
    return len({name.rpartition("_")[2] for name in kept if "/B_" in name})
