"""LoRAs of several concepts in one U-Net, weighted for each prompt and each cross-attention layer by how near the prompt is to the concepts.

Only hooks are added, so a stock `StableDiffusionPipeline` draws with it.

Source: CIDM, arXiv 2410.17594: weights, and those of a prompt for its unconditional half [code]; hooks are [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import normalize

from .layer_states import layer_states
from .token_rows import prompt_length


class PromptMixture:
    """Weights the LoRAs that are added to it, in the layers inside the cross-attention layers of a pipeline's U-Net.

    Args:
        pipe: a `StableDiffusionPipeline`, which has to draw the images itself: it says whether a batch has an unconditional half.

    Attributes:
        adapters: names of the LoRAs.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._layers = pipe, layer_states(pipe.text_encoder, pipe.unet)
        self._words: dict[str, tuple[torch.Tensor, float]] = {}
        self._weights: dict[str, torch.Tensor] = {}
        # After the hook of `LayerStates`, hence on a layer's own states.
        self._handles = [
            pipe.unet.get_submodule(name).register_forward_pre_hook(partial(self._weigh, number), with_kwargs=True)
            for number, name in enumerate(self._layers.names)
        ]

    @property
    def adapters(self) -> list[str]:
        return list(self._words)

    @torch.no_grad()
    def add(self, adapter: str, words: str, power: float) -> None:
        """Add a LoRA that is in the U-Net, by the words of its concept, token and noun; for `power`, see `concept_weights`."""
        pipe = self._pipe
        states = pipe.encode_prompt(words, pipe.device, 1, False)[0][0]
        # Without start and end.
        self._words[adapter] = states[1 : prompt_length(words, pipe.tokenizer) - 1], power
        for layer in pipe.unet.modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                self._handles.append(layer.lora_A[adapter].register_forward_hook(partial(self._weighted, adapter)))

    def remove(self) -> None:
        """Take out the hooks."""
        for handle in self._handles:
            handle.remove()

    def _weigh(self, number: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._words:
            return
        states, has_two_halves = kwargs["encoder_hidden_states"], self._pipe.do_classifier_free_guidance
        words = [self._layers.own(number, one) for one, _ in self._words.values()]
        powers = [power for _, power in self._words.values()]
        weights = concept_weights(states.chunk(2)[1] if has_two_halves else states, words, powers)
        self._weights = dict(zip(self._words, weights.repeat(1 + has_two_halves, 1).T, strict=True))

    def _weighted(self, adapter: str, _: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return out * self._weights[adapter].view(-1, 1, 1).to(out)


def concept_weights(states: torch.Tensor, words: Sequence[torch.Tensor], powers: Sequence[float]) -> torch.Tensor:
    """Return the weight of each concept for each prompt.

    Args:
        states: of prompts, `(b, length, width)`, every position.
        words: states of each concept's words, `(n, width)`.
        powers: of each concept.

    Returns:
        `(b, concepts)`, float32: |s|^power, divided by the sum over concepts; s is the mean over a concept's words of the largest cosine
        to a position of the prompt.

    Source: arXiv 2410.17594 with the power 4 [code]; the absolute value, for other powers, is [ours].
    """
    units = normalize(states.float(), dim=-1)
    near = [(units @ normalize(one.to(units), dim=-1).T).amax(dim=1).mean(dim=1) for one in words]
    # As a softmax of logarithms, since large powers of small cosines would be 0.
    logarithms = torch.stack(near, dim=1).abs().clamp_min(1e-12).log()
    return (logarithms * torch.tensor(powers).to(logarithms)).softmax(dim=1)
