"""The flow-matching loss on held-out images: cheap, and far more sensitive than accuracy."""

from __future__ import annotations

import torch

from .data.pixels import to_model_range
from .flow_matching import flow_matching_loss, interpolate, velocity_target
from .sampling.pipeline import FunLoraPipeline
from .tuner_base.weights import cached_weights
from .utils.seeds import generator_for


@torch.no_grad()
def held_out_loss(
    pipe: FunLoraPipeline,
    class_id: int,
    images: torch.Tensor,
    *,
    num_sigmas: int,
    seed: int,
    batch_size: int = 500,
) -> float:
    """Compute the mean flow-matching loss of a class on images that it was not trained on: the squared error of the velocity.

    Every image gets its own noise at each of `num_sigmas` evenly spaced times; the same seed gives the same times and
    noise, so that the losses of two models are comparable.

    Args:
        images: uint8, `(n, channels, height, width)`, n >= 1.
        num_sigmas: K; the times are (k + 1/2) / K.
        seed: seed of the noise.
        batch_size: images at once.

    Source: the loss is that of arXiv 2510.02631 [text]; measuring it on held-out images is [ours].
    """
    total, count = 0.0, 0
    with cached_weights(pipe.unet):
        for k in range(num_sigmas):
            generator = generator_for(seed, "held_out", class_id, k)
            for part in images.split(batch_size):
                sample = to_model_range(part)
                noise = torch.randn(sample.shape, generator=generator)
                sigma = torch.full((len(sample),), (k + 0.5) / num_sigmas)
                noisy = interpolate(sample, noise, sigma).to(pipe.device)
                output = pipe.predict_velocity(noisy, sigma.to(pipe.device), [class_id] * len(sample))
                total += flow_matching_loss(output.cpu(), velocity_target(sample, noise)).double().sum().item()
                count += len(sample)
    return total / count
