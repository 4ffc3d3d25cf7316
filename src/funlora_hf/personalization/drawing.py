"""Draw images of prompts with a stock pipeline, each from noise that depends only on the seed, the purpose and its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..text_to_image.token_rows import prompt_arguments
from ..utils.seeds import generator_for
from .arguments import ConceptEvaluationArguments


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    samples: int,
    *,
    purpose: str,
    seed: int,
    resolution: int,
    width: int | None = None,
    config: ConceptEvaluationArguments,
) -> torch.Tensor:
    """Draw images of prompts.

    Args:
        pipe: a pipeline of Stable Diffusion, SDXL, SD3, PixArt or Flux.
        prompts: p of them, with new tokens as they are written in captions.
        samples: images of each prompt.
        purpose: what the images are for; equal purposes and seeds give equal noise, whatever the weights.
        seed: seed of the run.
        resolution: height, in pixels.
        width: in pixels; None: as the height.
        config: how to sample.

    Returns:
        uint8, `(p * samples, 3, resolution, width)`, on the CPU, in the order of the prompts.
    """
    places = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    parts = []
    for start in range(0, len(places), config.sampling_batch_size):
        mine = places[start : start + config.sampling_batch_size]
        images = pipe(
            **prompt_arguments(pipe, [prompts[index] for index, _ in mine]),
            height=resolution,
            width=width or resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[generator_for(seed, purpose, *place) for place in mine],
            output_type="pt",
        ).images
        parts.append((images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8))
    # Of SDXL, the channels come last in memory.
    return torch.cat(parts).contiguous()
