"""Mix-of-Show: a LoRA and layer-wise rows for each concept, learned apart, and weights that give each concept's inputs its own outputs.

Source: arXiv 2305.18292: layers, inputs of the fusion and their order as in the authors' code [code]; least squares are solved in closed
form with a ridge, where the code runs L-BFGS [ours]. Not here: the LoRA of the text encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, cast

import torch
from torch import nn

from ...continual.strategies.merging_rules import Kept, MergingRule, Pairs, RuleOptions, only
from ...continual.strategies.weight_changes import Pair, product
from ...text_to_image.layer_states import LayerStates
from ...text_to_image.token_rows import prompt_arguments
from ...utils.field_types import Count, Range, one_of
from ...utils.seeds import generator_for
from ..concepts import Concept
from .base import Rates
from .one_model import LowRank
from .orthogonal_adaptation import tasks_in


Deltas = dict[str, torch.Tensor]
Grams = dict[str, torch.Tensor]
_TEMPLATES = ("{}", "photo of a {}")


@dataclass
class MixOfShowOptions(RuleOptions):
    """
    Args:
        fuse: "each": fuse all concepts so far after every concept [ours]; "end": after the last one [code], until then each concept is
            sampled with its own LoRA.
        merge_weight: alpha, by which each product is multiplied.
        fusion_steps: steps of the image whose activations are the inputs of all layers but K and V of the text; 20 [code].
        ridge: weight of ||W - W0||^2, as a share of the mean square of the inputs' entries [ours]; 0: the smallest change that fits best. Where inputs
            of concepts are nearly dependent, as on the tiny base, a small ridge makes the change far larger than those of the concepts.
    """

    fuse: Annotated[str, one_of("each", "end")] = "each"
    merge_weight: Annotated[float, Range(0, 10, above=True)] = 1.0
    fusion_steps: Count = 20
    ridge: Annotated[float, Range(0, 1)] = 1e-2


class MixOfShowRule(MergingRule):
    """Keeps the pair of each task, trained on the base; the strategy adds the fused changes."""

    name, grows = "mix_of_show", True

    def deltas(self, kept: Kept) -> Deltas:
        return only(kept, "delta")

    def training_deltas(self, kept: Kept) -> Deltas:
        return {}

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        number = tasks_in(kept)
        parts = {
            f"{layer}/{part}_{number}": one for layer, pair in learned.items() for part, one in pair._asdict().items()
        }
        return {**{name: one for name, one in kept.items() if not name.endswith("/delta")}, **parts}

    def own(self, kept: Kept, number: int) -> Deltas:
        """Return the changes of one task alone, from 0, with their weight."""
        A, B = (only(kept, f"{part}_{number}") for part in "AB")
        return {layer: self.options.merge_weight * product(Pair(A[layer], B[layer])) for layer in A}


class MixOfShow(LowRank):
    """Trains a LoRA on all attention, and fuses the LoRAs of concepts by their inputs."""

    name, rule_class = MixOfShowRule.name, MixOfShowRule
    options_class = MixOfShowOptions
    rates = Rates(2.4e-3, 1e-4)
    token_rates = Rates(2e-2, 1e-3)
    default_layers = "attention"
    layerwise = True
    rule: MixOfShowRule

    def check(self) -> None:
        super().check()
        for name in self.target_modules():
            if not isinstance(self.model.denoiser.get_submodule(name), nn.Linear):
                raise ValueError(
                    f"`target_modules` has {name!r}, which is no linear layer, and `strategy` {self.name!r} fuses linear layers only: leave it out."
                )

    def deltas_of(self, class_ids: Sequence[int], kept: Kept) -> Mapping[str, torch.Tensor]:
        if fused := self.deltas(kept):
            return fused
        learned = [task.index for task in self.setting.tasks[: tasks_in(kept)] if set(task.class_ids) & set(class_ids)]
        own = [self.rule.own(kept, number) for number in learned]
        return {layer: torch.stack([one[layer] for one in own]).sum(dim=0) for layer in own[0]} if own else {}

    @torch.no_grad()
    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        kept = super().learned(kept)
        if self.options.fuse == "each" or tasks_in(kept) == len(self.setting.tasks):
            self.take_out()
            self.model.eval()
            return {**kept, **{f"{layer}/delta": one for layer, one in self._fused(kept).items()}}
        return kept

    def _fused(self, kept: Kept) -> Deltas:
        """Return the change of each layer that gives the inputs of every concept the outputs of its own LoRA best."""
        changes = [self.rule.own(kept, number) for number in range(tasks_in(kept))]
        concepts = [self.setting.concepts[task.class_ids[0]] for task in self.setting.tasks[: len(changes)]]
        of_text = [name for name in self._originals if name in self.model.layers("kv")]
        others = [name for name in self._originals if name not in of_text]
        text = self._solved(of_text, changes, (self._grams_of_text(of_text, one) for one in concepts))
        # Activations are those of each concept's own LoRA, but with the fused layers of the text.
        inputs = (self._grams(others, {**own, **text}, one) for own, one in zip(changes, concepts, strict=True))
        fused = {**text, **self._solved(others, changes, inputs)}
        return {name: fused[name] for name in self._originals}

    def _solved(self, layers: Sequence[str], changes: Sequence[Deltas], grams: Iterable[Grams]) -> Deltas:
        """Return the fused changes of layers; `grams` is read concept by concept, since those of all may not fit into memory."""
        total, wanted = (dict.fromkeys(layers, torch.zeros((), dtype=torch.float64)) for _ in range(2))
        for own, of_concept in zip(changes, grams, strict=True):
            total = {layer: total[layer] + of_concept[layer] for layer in layers}
            wanted = {layer: wanted[layer] + own[layer].double() @ of_concept[layer] for layer in layers}
        return {layer: fused_change(wanted[layer], total[layer], self.options.ridge) for layer in layers}

    def _grams_of_text(self, layers: Sequence[str], concept: Concept) -> Grams:
        """Of the states of token, noun and end in two prompts."""
        parts = cast("LayerStates", self.rows.layers)
        words, sentence = (self.states(concept.prompt(template)) for template in _TEMPLATES)
        states = torch.cat([words, sentence[-len(words) :]])
        own = {layer: parts.own(parts.names.index(layer.rpartition(".")[0]), states) for layer in layers}
        return {layer: X.T @ X for layer, X in own.items()}

    def _grams(self, layers: Sequence[str], deltas: Mapping[str, torch.Tensor], concept: Concept) -> Grams:
        """Of the inputs of layers while one image of a concept is drawn without guidance, with these changes."""
        if not layers:
            return {}
        self.put(deltas)
        pipe, prompt = self.model.pipeline(), concept.prompt(_TEMPLATES[1])
        size = self.setting.arguments.resolution or self.model.resolution
        with recorded(self.model.denoiser, layers) as grams:
            pipe(
                **prompt_arguments(pipe, prompt),
                height=size,
                width=size,
                num_inference_steps=self.options.fusion_steps,
                guidance_scale=1.0,
                generator=generator_for(self.setting.training.seed, self.name, "fusion", concept.name),
                output_type="latent",
            )
        self.put({})
        return grams


def fused_change(wanted: torch.Tensor, total: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the change `D` of a weight, `(out, in)`, float32, that minimizes `sum_i ||D_i X_i - D X_i||^2 + ridge * m * ||D||^2`, `m` the mean diagonal of `total`.

    Args:
        wanted: `sum_i D_i X_i X_i^T`, `(out, in)`, float64, from the changes `D_i` and the inputs `X_i` of each concept.
        total: `sum_i X_i X_i^T`, `(in, in)`, float64.
        ridge: >= 0; 0 gives, of all minima, the one with the smallest norm, to which L-BFGS from `D = 0` converges.

    Source: objective of arXiv 2305.18292 [code]; closed form and ridge [ours].
    """
    if not ridge:
        return (wanted @ torch.linalg.pinv(total, hermitian=True)).float()
    damped = total + ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
    return torch.linalg.solve(damped, wanted.T).T.float()


@contextmanager
def recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[Grams]:
    """Sum up `X X^T` of the inputs of linear layers, float64, as long as the context lasts; the inputs are not kept."""
    grams: Grams = {}

    def note(layer: str, _: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        X = arguments[0].flatten(0, -2).double()
        grams[layer] = grams.get(layer, 0) + X.T @ X

    handles = [model.get_submodule(one).register_forward_pre_hook(partial(note, one)) for one in layers]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
