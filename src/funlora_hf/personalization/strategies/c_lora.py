"""C-LoRA: a LoRA for each task on the sum of the earlier ones, which a penalty keeps from the entries that these have changed.

Source: "Continual Diffusion", arXiv 2304.06027: layers, form of the penalty and no word of the class in prompts [text], the rate
[recall]. No code of the authors is public.
"""

from __future__ import annotations

from typing import Any

import torch

from ...continual.strategies.low_rank import get_pairs
from ...continual.strategies.merging_rules import Kept
from ...continual.strategies.penalty_rules import CLoraRule, CLoraRuleOptions, product_norm
from .base import Rates
from .one_model import LowRank


class CLora(LowRank):
    """Trains a new pair for each task; the products of all are added to the weights."""

    name, rule_class = CLoraRule.name, CLoraRule
    options_class = CLoraRuleOptions
    rates = Rates(2.4e-3, 5e-4)
    default_layers = "kv"

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        norm = product_norm(get_pairs(self.model.denoiser))
        norms = kept.get("norms", norm.new_empty(0))
        return {**super().learned(kept), "norms": torch.cat([norms, norm.reshape(1)])}

    def details(self) -> dict[str, Any]:
        """Return the Frobenius norm of each task's product, all layers together."""
        return {"product_norms": self.load(self.setting.tasks)["norms"].tolist()}
