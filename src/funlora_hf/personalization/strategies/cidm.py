"""CIDM: a LoRA and layer-wise rows for each concept, kept apart from earlier ones by a penalty, and mixed for each prompt.

Source: arXiv 2410.17594; layers, losses and weights as in the authors' code [code], where the paper has other losses. See
`PromptMixture` for the mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from diffusers import DiffusionPipeline

from ...adapters.untrusted_adapter import read_adapter
from ...continual.learning import Phase, Trainable
from ...continual.strategies.low_rank import pair_parameters
from ...continual.strategies.merging_rules import RuleOptions
from ...text_to_image.prompt_mixture import PromptMixture
from ...tuner.hotswap import plain_key
from ...utils.field_types import Range, one_of
from .base import ConceptSetting, Rates
from .per_concept import LIVE, Lora


_OUTPUTS = ".lora_B.weight"


@dataclass
class CidmOptions(RuleOptions):
    """
    Args:
        loss: what is added to the loss of a task after the first. "orthogonal": the columns of B are to be orthogonal to those of
            earlier tasks [ours]; "released": the authors' two terms, of which the second pulls all entries of B towards 1 [code].
        penalty: its weight; 0.1 [code].
        power: of the nearness of a prompt to a concept; 4 [code], 0: all concepts have the same weight.
        merge_weight: by which all products are multiplied when images are drawn; 0.8 [code].
    """

    loss: Annotated[str, one_of("orthogonal", "released")] = "orthogonal"
    penalty: Annotated[float, Range(0, 1e12)] = 0.1
    power: Annotated[float, Range(0, 100)] = 4.0
    merge_weight: Annotated[float, Range(0, 10, above=True)] = 0.8


class Cidm(Lora):
    """Trains a LoRA for each concept on the untouched base; images are drawn with all of them, weighted by the prompt."""

    name = "cidm"
    options_class = CidmOptions
    rates = Rates(2.4e-2, 1e-4)
    token_rates = Rates(2e-2, 1e-3)
    layerwise = True
    learning_changes_past_classes = True

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self._trained: dict[str, torch.Tensor] = {}
        self._earlier: list[dict[str, torch.Tensor]] = []

    @property
    def mixture_power(self) -> float:
        return self.options.power

    def check(self) -> None:
        super().check()
        for name in self.target_modules():
            if ".attn2." not in name:
                raise ValueError(
                    f"`target_modules` has {name!r}, which is no layer of cross-attention, and `strategy` {self.name!r} weights concepts by "
                    "the text that cross-attention reads: leave it out."
                )

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        self._trained = {layer: pair.B for layer, pair in pair_parameters(self.model.denoiser, LIVE).items()}
        self._earlier = [self._outputs(class_id) for class_id in self.setting.past(self.task_of(phase))]
        return trainable

    def penalty(self) -> torch.Tensor | float:
        return self.options.penalty * overlap(self._trained, self._earlier, self.options.loss)

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        # So that the saved LoRA alone is what one concept alone is drawn with.
        self.model.denoiser.peft_config[LIVE].lora_alpha = self.options.merge_weight * self.rank
        super().end_phase(phase, trainable)

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._trained, self._earlier = {}, []

    @contextmanager
    def sampling(self, *class_ids: int) -> Iterator[DiffusionPipeline]:
        learned = [class_id for class_id in self.setting.concepts if self.is_kept(class_id)]
        with super().sampling(*learned) as pipe:
            mixture = PromptMixture(pipe)
            try:
                for class_id in learned:
                    concept = self.setting.concepts[class_id]
                    mixture.add(concept.name, concept.prompt("{}"), self.mixture_power)
                yield pipe
            finally:
                mixture.remove()

    def _outputs(self, class_id: int) -> dict[str, torch.Tensor]:
        """Return B of a learned concept by layer."""
        tensors = read_adapter(self.folder(class_id)).tensors()
        named = {plain_key(key): one.to(self.setting.device) for key, one in tensors.items()}
        return {name.removesuffix(_OUTPUTS): one for name, one in named.items() if name.endswith(_OUTPUTS)}


def overlap(
    trained: Mapping[str, torch.Tensor], earlier: Sequence[Mapping[str, torch.Tensor]], loss: str
) -> torch.Tensor | float:
    """Return the mean over earlier concepts s and layers of a term of B_t, `(out, r)`, and B_s; 0 without earlier ones.

    Args:
        trained: B_t by layer.
        earlier: B_s by layer, of each concept.
        loss: "orthogonal": ||B_t^T B_s||_F^2 [ours]; "released": mean |B_t B_s^T| + mean (B_t - 1)^2, means over entries [code].
    """
    term = _orthogonal if loss == "orthogonal" else _released
    terms = [term(trained[layer], old) for one in earlier for layer, old in one.items()]
    return torch.stack(terms).mean() if terms else 0.0


def _orthogonal(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new.T @ old).square().sum()


def _released(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new @ old.T).abs().mean() + (new - 1).square().mean()
