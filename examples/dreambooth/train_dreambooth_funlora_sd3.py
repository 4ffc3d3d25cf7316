"""Teaches Stable Diffusion 3 or Flux a subject from a few images, as a FunLoRA adapter. See docs/guides/dreambooth.md.

accelerate launch examples/dreambooth/train_dreambooth_funlora_sd3.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
    --instance_data_dir images_of_a_dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from dreambooth_training import DreamBoothArguments, Prompt, argument, main
from funlora_hf.text_to_image.objective import Objective
from funlora_hf.utils.checks import check_choice


PIPELINES = (StableDiffusion3Pipeline, FluxPipeline)
_DENSITIES = {"logit_normal": "logit_normal", "none": "uniform"}


@dataclass
class FlowArguments(DreamBoothArguments):
    """And what flow matching takes."""

    weighting_scheme: str = argument("logit_normal", "Density of the times: 'logit_normal', or 'none', uniform.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting_scheme", self.weighting_scheme, tuple(_DENSITIES))


class FlowMatching:
    """The squared error of the velocity. Source: as diffusers' DreamBooth scripts."""

    def __init__(self, pipe: Any, arguments: FlowArguments) -> None:
        self.objective = Objective(pipe.scheduler, timestep_density=_DENSITIES[arguments.weighting_scheme])
        self.is_flux = isinstance(pipe, FluxPipeline)
        self.is_guided = getattr(pipe.transformer.config, "guidance_embeds", False)

    def __call__(
        self, model: Callable[..., Any], latents: torch.Tensor, prompt: Prompt, generator: torch.Generator
    ) -> torch.Tensor:
        states, device = prompt["prompt_embeds"], latents.device
        times = self.objective.times(len(latents), generator).to(device)
        noise = self.objective.noise(latents.shape, generator).to(device)
        inputs = {"encoder_hidden_states": states, "pooled_projections": prompt["pooled_prompt_embeds"]}
        timestep = times
        if self.is_flux:
            height, width = latents.shape[2] // 2, latents.shape[3] // 2
            latents, noise = (FluxPipeline._pack_latents(one, *latents.shape) for one in (latents, noise))
            inputs["img_ids"] = FluxPipeline._prepare_latent_image_ids(1, height, width, device, states.dtype)
            inputs["txt_ids"] = torch.zeros(states.shape[1], 3, device=device, dtype=states.dtype)
            timestep = times / self.objective.num_train_timesteps  # it multiplies by them itself
            if self.is_guided:  # FLUX.1-dev; 1 as in the README of diffusers' script
                inputs["guidance"] = torch.ones_like(times)
        noisy = self.objective.noisy(latents, noise, times)
        output = model(noisy.to(states.dtype), timestep=timestep, **inputs, return_dict=False)[0]
        return self.objective.losses(output, latents, noise, times)


if __name__ == "__main__":
    main(FlowArguments, PIPELINES, FlowMatching, __doc__.partition("\n")[0])
