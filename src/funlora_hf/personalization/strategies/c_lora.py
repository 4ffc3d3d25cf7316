"""C-LoRA: a LoRA for each task on the sum of the earlier ones, which a penalty keeps from the entries that these have changed.

Source: "Continual Diffusion", arXiv 2304.06027: layers, form of the penalty and no word of the class in prompts [text], the numbers
in the doc of the options [recall]; the norm is summed over layers, as in T2I-ConBench's code [code]. No code of the authors is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ...continual.learning import Phase, Trainable
from ...continual.strategies.low_rank import get_pairs, pair_parameters
from ...continual.strategies.merging_rules import Kept, MergeInitRule, RuleOptions
from ...continual.strategies.weight_changes import Pair, product
from ...utils.field_types import Range
from .base import Rates
from .one_model import LowRank


@dataclass
class CLoraOptions(RuleOptions):
    """
    Args:
        penalty: lambda. The paper has 1e6, found by a sweep for Stable Diffusion [recall]; it belongs to the size of the base's
            weights, and one that is too large leaves later concepts unlearned: look at `product_norms` in results.json.
    """

    penalty: Annotated[float, Range(0, 1e12)] = 1e6


class CLora(LowRank):
    """Trains a new pair for each task; the products of all are added to the weights."""

    name, rule_class = "clora", MergeInitRule
    options_class = CLoraOptions
    rates = Rates(2.4e-3, 5e-4)
    default_layers = "kv"
    _past: dict[str, torch.Tensor]

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        self._past = dict(self.deltas(self.kept_before(phase)))
        return trainable

    def penalty(self) -> torch.Tensor | float:
        """Return lambda times the sum over layers of ||(sum of past B A) * (B A)||_F^2, in float32; 0 in the first task."""
        found = pair_parameters(self.model.denoiser)
        pairs = {name: Pair(found[name].A.flatten(1), found[name].B.flatten(1)) for name in self._past}
        terms = [(past * product(pairs[name])).square().sum() for name, past in self._past.items()]
        return self.options.penalty * torch.stack(terms).sum() if terms else 0.0

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        pairs = get_pairs(self.model.denoiser)
        norm = torch.stack([product(pair).double().square().sum() for pair in pairs.values()]).sum().sqrt()
        norms = kept.get("norms", norm.new_empty(0))
        return {**self.rule.merge(kept, pairs), "norms": torch.cat([norms, norm.reshape(1)])}

    def details(self) -> dict[str, Any]:
        """Return the Frobenius norm of each task's product, all layers together."""
        return {"product_norms": self.load(self.setting.tasks)["norms"].tolist()}
