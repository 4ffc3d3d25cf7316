"""Rules of pairs that stay while new ones are trained, and of penalties on what earlier tasks have used: T2I-ConBench's baselines.

Source: T2I-ConBench, arXiv 2505.16875: formulas, weights and the sums over layers [code].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch

from ...utils.field_types import Range, one_of
from .merging_rules import Kept, MergeInitRule, MergingRule, Pairs, RuleOptions, only, pack, unpack
from .weight_changes import Pair, concatenated, product


@dataclass
class OLoraRuleOptions(RuleOptions):
    """
    Args:
        penalty: weight of the sum of absolute values. T2I-ConBench has 0.1 for B, the code of O-LoRA's authors 0.5 for A [code].
        orthogonal: which matrices of two tasks are to be orthogonal. "B", their outputs, as in O-LoRA's text, which names B "A"
            [text], and in T2I-ConBench [code]; "A", their inputs, as in the code of O-LoRA's authors [code].
    """

    penalty: Annotated[float, Range(0, 1e12)] = 0.1
    orthogonal: Annotated[str, one_of("B", "A")] = "B"


@dataclass
class CLoraRuleOptions(RuleOptions):
    """
    Args:
        penalty: lambda. The paper has 1e6, found by a sweep for Stable Diffusion [recall], and so has T2I-ConBench [code]; it belongs
            to the size of the base's weights, and one that is too large leaves later tasks unlearned: look at the products' norms.
    """

    penalty: Annotated[float, Range(0, 1e12)] = 1e6


class IncLoraRule(MergingRule):
    """Trains a new pair for each task; the earlier ones stay, frozen and active."""

    name = "inc_lora"
    grows = True

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        past = unpack(kept)
        return pack({layer: concatenated(past[layer], pair) if past else pair for layer, pair in learned.items()})


class OLoraRule(IncLoraRule):
    """Like inc_lora, with a penalty that keeps a task's pairs orthogonal to those of earlier tasks.

    Source: O-LoRA, arXiv 2310.14152; see `OLoraRuleOptions`.
    """

    name = "o_lora"

    def penalty(self, kept: Kept, pairs: Pairs) -> torch.Tensor | float:
        """Return the weight times the sum of |B_s^T B_t|, or |A_s A_t^T|, over entries, layers and earlier tasks s."""
        past = unpack(kept)
        return _weighted(self.options.penalty, (self._overlap(old, pairs[name]).abs() for name, old in past.items()))

    def _overlap(self, old: Pair, new: Pair) -> torch.Tensor:
        """Return the inner products of all earlier tasks' vectors with the new ones, `(earlier tasks * r, r)`."""
        return old.B.T @ new.B if self.options.orthogonal == "B" else old.A @ new.A.T


class CLoraRule(MergeInitRule):
    """Adds every task's product to the weights; a penalty keeps the next one from the entries that these have changed.

    Source: "Continual Diffusion", arXiv 2304.06027 [text]; the norm is summed over layers [code: T2I-ConBench].
    """

    name = "clora"

    def penalty(self, kept: Kept, pairs: Pairs) -> torch.Tensor | float:
        """Return lambda times the sum over layers of ||(sum of past B A) * (B A)||_F^2."""
        past = only(kept, "delta")
        return _weighted(self.options.penalty, ((old * product(pairs[name])).square() for name, old in past.items()))


def product_norm(pairs: Pairs) -> torch.Tensor:
    """Return the Frobenius norm of a task's product, all layers together, float64."""
    return torch.stack([product(pair).double().square().sum() for pair in pairs.values()]).sum().sqrt()


def _weighted(weight: float, terms: Iterable[torch.Tensor]) -> torch.Tensor | float:
    """Return the weighted sum over the entries of all terms; 0 if there are none."""
    sums = [term.sum() for term in terms]
    return weight * torch.stack(sums).sum() if sums else 0.0
