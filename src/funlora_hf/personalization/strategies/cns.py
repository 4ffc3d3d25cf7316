"""CNS, reconstructed: only those entries of the text's projections are trained that respond to a concept and not to everything.

No code is public, and only abstract, project page and third parties' summaries were read: what is trained, that neurons of the concept
are "base minus general", and that a term ties them to earlier and pretrained weights is [text]; every formula, threshold and
rate here is [ours]. Source: arXiv 2510.02296.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...continual.learning import Phase, Trainable
from ...continual.strategies.merging_rules import Kept, RuleOptions, only
from ...utils.field_types import Range, one_of
from ..usual_captions import usual_captions
from .base import ConceptSetting, Rates
from .one_model import FullWeights


Masks = dict[str, torch.Tensor]


@dataclass
class CnsOptions(RuleOptions):
    """
    Args:
        base_fraction: share of each matrix's entries, those of the highest scores, that respond to a concept or a caption.
        general_share: share of the calibration captions to which a general entry responds, one by one; above 1, no entry is general.
        overlap: entries that earlier concepts have trained are "regularised", or "excluded" from training.
        penalty: lambda of the term that ties entries to their values before the task, if an earlier concept trained them, or
            else, times `gamma`, to those of the base.
        gamma: see there.
    """

    base_fraction: Annotated[float, Range(0, 1, above=True)] = 0.1
    general_share: Annotated[float, Range(0, 2)] = 0.5
    overlap: Annotated[str, one_of("regularised", "excluded")] = "regularised"
    penalty: Annotated[float, Range(0, 1e12)] = 1e-4
    gamma: Annotated[float, Range(0, 1e6)] = 1.0


class Cns(FullWeights):
    """Trains chosen entries of `to_k` and `to_v` of cross-attention, and the row of the token.

    The score of an entry is |W0_ij| times the root mean square of the j-th state over a prompt's words: masks depend on the
    base and the noun only, so two concepts of one noun share all their entries.
    """

    name, options_class = "cns", CnsOptions
    rates = Rates(1.5e-2, 1e-5)
    # Until no concept has entries of its own; at most to the size of all layers.
    grows_with_tasks = True

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self._general: Masks | None = None
        self._masks: Masks = {}
        # By layer: what its entries are tied to, and by which weights.
        self._ties: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def check(self) -> None:
        super().check()
        self.check_reads_text()
        if decay := self.setting.training.concept_weight_decay:
            raise ValueError(
                f"`concept_weight_decay` is {decay}, but `strategy` 'cns' trains single entries: leave it out."
            )
        taken = self.support({})
        for task in self.setting.tasks:
            for name, mask in self.masks(task.class_ids[0], taken).items():
                taken[name] |= mask

    def deltas(self, kept: Kept) -> dict[str, torch.Tensor]:
        values = only(kept, "values")
        found = {}
        for name, indices in only(kept, "indices").items():
            delta = torch.zeros(self._originals[name].shape, device=indices.device)
            delta.view(-1)[indices.long()] = values[name]
            found[name] = delta
        return found

    def build(self, phase: Phase) -> Trainable:
        (class_id,) = phase.class_ids
        self._masks = self.masks(class_id, self.support(self.kept_before(phase)))
        return super().build(phase)

    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        support, parameters = self.support(kept), super().adapted(kept)
        for name, mask in self._masks.items():
            weight, used = self.weight(name), mask & support[name]
            base = self._originals[name].to(weight)
            self._ties[name] = (
                torch.where(used, weight.detach(), base),
                torch.where(used, 1.0, self.options.gamma) * mask,
            )
            # With a gradient of 0, Adam without decay and its average change nothing.
            self._hooks.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
        return parameters

    def penalty(self) -> torch.Tensor | float:
        """Return lambda times the sum over the entries that are trained, of their squared change since the task before or the base."""
        if not self.options.penalty:
            return 0.0
        terms = [(weights * (self.weight(name) - tied).square()).sum() for name, (tied, weights) in self._ties.items()]
        return self.options.penalty * torch.stack(terms).sum()

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        support, earlier, changes = self.support(kept), self.deltas(kept), self.changes()
        for name, mask in self._masks.items():
            union = (mask | support[name]).flatten().nonzero()[:, 0]
            # Weight minus base is a rounded number: what was not trained stays as it was kept.
            values = torch.where(mask, changes[name], earlier.get(name, 0.0))
            found |= {f"{name}/indices": union.int(), f"{name}/values": values.flatten()[union]}
        trained = sum(int(mask.sum()) for mask in self._masks.values())
        overlap = sum(int((mask & support[name]).sum()) for name, mask in self._masks.items())
        notes = {"shares": trained / self.trained_numbers(), "overlaps": overlap / trained}
        of_tasks = {name: [*kept.get(name, torch.empty(0)).tolist(), one] for name, one in notes.items()}
        return {**found, **{name: torch.tensor(values) for name, values in of_tasks.items()}}

    def take_out(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._ties.clear()
        super().take_out()

    def numbers_per_concept(self) -> int:
        """Count the entries of the first concept's mask, and its rows; those of others differ, see `details`."""
        first = self.masks(self.setting.tasks[0].class_ids[0], self.support({}))
        return sum(int(mask.sum()) for mask in first.values()) + self.row_numbers()

    def details(self) -> dict[str, Any]:
        """Return each concept's share of the entries of all layers, and the share of these that an earlier concept had trained."""
        kept = self.load(self.setting.tasks)
        return {"mask_shares": kept["shares"].tolist(), "mask_overlaps": kept["overlaps"].tolist()}

    def masks(self, class_id: int, support: Masks) -> Masks:
        """Return the entries to train for a concept, bool in the shape of each weight: base minus general (minus earlier) ones.

        Raises:
            ValueError: there are none.
        """
        general, options = self.general_masks(), self.options
        masks = {name: mask & ~general[name] for name, mask in self.base_masks(class_id).items()}
        chosen = f"base_fraction={options.base_fraction} and general_share={options.general_share}"
        remedy = "raise one of them"
        if any(mask.any() for mask in masks.values()) and options.overlap == "excluded":
            masks = {name: mask & ~support[name] for name, mask in masks.items()}
            chosen += " and overlap=excluded, since earlier concepts have them all"
            remedy = "take overlap=regularised, or concepts of other nouns"
        if not any(mask.any() for mask in masks.values()):
            raise ValueError(
                f"`strategy` 'cns' finds no entry to train for the concept {self.setting.concepts[class_id].name!r}, with {chosen}: "
                f"{remedy}."
            )
        return masks

    def support(self, kept: Kept) -> Masks:
        """Return the entries that earlier concepts have trained."""
        indices = only(kept, "indices")
        found = {}
        for name, weight in self._originals.items():
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=self.setting.device)
            if name in indices:
                mask[indices[name].long()] = True
            found[name] = mask.view(weight.shape)
        return found

    def base_masks(self, class_id: int) -> Masks:
        """Return the entries that respond to a concept's noun: the token's row starts as the noun's."""
        concept = self.setting.concepts[class_id]
        return self._top([f"a photo of a {concept.noun}", concept.noun])

    def general_masks(self) -> Masks:
        """Return the entries that respond to many of the calibration captions, one by one."""
        if self._general is None:
            nouns = {concept.noun for concept in self.setting.concepts.values()}
            captions = [text for text in usual_captions(tiny=self.setting.is_tiny) if not nouns & set(text.split())]
            votes = {name: torch.zeros_like(weight, dtype=torch.int32) for name, weight in self._originals.items()}
            for text in captions:
                for name, mask in self._top([text]).items():
                    votes[name] += mask.cpu()
            least = self.options.general_share * len(captions)
            self._general = {name: (count >= least).to(self.setting.device) for name, count in votes.items()}
        return self._general

    def _top(self, texts: Sequence[str]) -> Masks:
        """Return the entries of the highest scores for some texts; of equal scores, the first ones."""
        states = torch.cat([self.states(text) for text in texts])
        rms = states.square().mean(dim=0).sqrt().cpu()
        masks = {}
        for name, weight in self._originals.items():
            scores = (weight.double().abs() * rms).flatten()
            count = max(1, round(self.options.base_fraction * len(scores)))
            mask = torch.zeros(len(scores), dtype=torch.bool)
            mask[scores.sort(descending=True, stable=True).indices[:count]] = True
            masks[name] = mask.view(weight.shape).to(self.setting.device)
        return masks
