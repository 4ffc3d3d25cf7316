"""The weights of concepts against their formula, and what a U-Net computes with them against weights that are put in by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concept_strategies import make_pipe
from peft.tuners.lora import LoraLayer

from funlora_hf.continual.strategies.low_rank import gaussian_lora
from funlora_hf.text_to_image.model import TextToImageModel
from funlora_hf.text_to_image.prompt_mixture import PromptMixture, concept_weights


def by_formula(states, words, power):
    """Written out, for one prompt."""
    near = []
    for one in words:
        cosines = [
            max(word @ state / np.linalg.norm(word) / np.linalg.norm(state) for state in states) for word in one
        ]
        near.append(sum(cosines) / len(cosines))
    powers = [abs(s) ** power for s in near]
    return np.array(powers) / sum(powers)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0, 60.0])
def test_weights_equal_their_formula(power):
    numbers = np.random.default_rng(0)
    states, words = numbers.normal(size=(3, 7, 5)), [numbers.normal(size=(n, 5)) for n in (2, 1, 3)]
    words[1] = -states[0, :1] - states[0, 1:2]
    found = concept_weights(torch.tensor(states), list(map(torch.tensor, words)), [power] * 3)
    expected = [by_formula(prompt, words, power) for prompt in states]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.sum(dim=1), 1, rtol=1e-6)
    alone = concept_weights(torch.tensor(states), [torch.tensor(words[0])], [power])
    assert torch.equal(alone, torch.ones(3, 1))


@pytest.fixture(scope="module")
def mixed():
    """A pipeline with two LoRAs of rank 2 on cross-attention, and layer-wise rows for their tokens, all of them random."""
    torch.manual_seed(0)
    model = TextToImageModel(make_pipe())
    model.add_rows({"<v0>": "b", "<v1>": "c"}, num_vectors=2, layerwise=True)
    for row in model.rows.parameters():
        row.data.normal_()
    for name in ("one", "two"):
        model.denoiser.add_adapter(gaussian_lora(2, model.layers("cross")), adapter_name=name)
    for layer in model.denoiser.modules():
        if isinstance(layer, LoraLayer):
            for B in layer.lora_B.values():
                B.weight.data.normal_()
    model.denoiser.set_adapter(["one", "two"])
    return model.eval()


def run(model, latents, prompt_embeds):
    with torch.no_grad():
        return model.denoiser(latents, 10, encoder_hidden_states=prompt_embeds).sample


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_image_has_the_weights_of_its_prompt(guidance, mixed):
    """Also in the unconditional half, by PEFT's own scaling of each adapter in each layer."""
    pipe = mixed.pipeline()
    pipe._guidance_scale = guidance
    prompts = ["a <v0> b", "a d"]
    embeds = mixed.encode(prompts)["prompt_embeds"].detach()
    empty = mixed.encode(["", ""])["prompt_embeds"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    has_two = guidance > 1
    mixture = PromptMixture(pipe)
    mixture.add("one", "<v0> b", 4.0)
    mixture.add("two", "<v1> c", 4.0)
    assert mixture.adapters == ["one", "two"]
    try:
        inputs = (torch.cat([latents] * 2), torch.cat([empty, embeds])) if has_two else (latents, embeds)
        found = run(mixed, *inputs)
    finally:
        mixture.remove()

    layers = mixed.rows.layers
    # "<v0> <v0>_1 b" between start and end.
    words = [mixed.encode([text])["prompt_embeds"][0, 1:4].detach() for text in ("<v0> b", "<v1> c")]
    everywhere = set()
    for number in range(2):
        for index, attention in enumerate(layers.names):
            own = [layers.own(index, one).numpy() for one in (embeds[number], *words)]
            weights = by_formula(own[0], own[1:], 4.0)
            everywhere.add(round(weights[0], 6))
            for layer in mixed.denoiser.get_submodule(attention).modules():
                if isinstance(layer, LoraLayer):
                    layer.scaling.update(one=weights[0], two=weights[1])
        for half, states in ((found[:2], empty), (found[2:], embeds)) if has_two else ((found, embeds),):
            expected = run(mixed, latents[number : number + 1], states[number : number + 1])
            torch.testing.assert_close(half[number : number + 1], expected, rtol=1e-4, atol=1e-5)
    assert len(everywhere) == 2 * len(layers.names)
    for layer in mixed.denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling.update(one=1.0, two=1.0)


def test_removed_hooks_leave_the_model_as_it_was(mixed):
    embeds, latents = mixed.encode(["a <v0> b"])["prompt_embeds"].detach(), torch.ones(1, 4, 8, 8)
    before = run(mixed, latents, embeds)
    pipe = mixed.pipeline()
    pipe._guidance_scale = 1.0
    mixture = PromptMixture(pipe)
    assert torch.equal(run(mixed, latents, embeds), before)
    mixture.add("one", "<v0> b", 4.0)
    mixture.add("two", "<v1> c", 4.0)
    assert not torch.equal(run(mixed, latents, embeds), before)
    mixture.remove()
    assert torch.equal(run(mixed, latents, embeds), before)
