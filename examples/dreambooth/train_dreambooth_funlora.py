"""Teaches Stable Diffusion or SDXL a subject from a few images, as a FunLoRA adapter. See docs/guides/dreambooth.md.

accelerate launch examples/dreambooth/train_dreambooth_funlora.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --instance_data_dir images_of_a_dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from dreambooth_training import DreamBoothArguments, Prompt, main
from funlora_hf.text_to_image.objective import Objective


PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline)


class Denoising:
    """The squared error of the noise, or of v, whichever the model predicts. Source: as diffusers' DreamBooth scripts."""

    def __init__(self, pipe: Any, arguments: DreamBoothArguments) -> None:
        self.objective = Objective(pipe.scheduler)
        # Original size, corner of the crop, size: the images are cropped before.
        size = [arguments.resolution] * 2
        self.time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)

    def __call__(
        self, model: Callable[..., Any], latents: torch.Tensor, prompt: Prompt, generator: torch.Generator
    ) -> torch.Tensor:
        states = prompt["prompt_embeds"]
        times = self.objective.times(len(latents), generator).to(latents.device)
        noise = self.objective.noise(latents.shape, generator).to(latents.device)
        added = None
        if "pooled_prompt_embeds" in prompt:  # SDXL
            ids = self.time_ids.expand(len(latents), -1).to(latents.device)
            added = {"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": ids}
        noisy = self.objective.noisy(latents, noise, times).to(states.dtype)
        output = model(noisy, times, states, added_cond_kwargs=added, return_dict=False)[0]
        return self.objective.losses(output, latents, noise, times)


if __name__ == "__main__":
    main(DreamBoothArguments, PIPELINES, Denoising, __doc__.partition("\n")[0])
