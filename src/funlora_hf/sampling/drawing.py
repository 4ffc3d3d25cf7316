"""Draw images of a class, the same ones every time."""

from __future__ import annotations

import hashlib
from statistics import mean
from typing import NamedTuple

import torch

from ..tuner import cached_weights
from ..utils.checks import check_at_least_one
from ..utils.seeds import generator_for
from .guidance import Guidance
from .pipeline import FunLoraPipeline


class Samples(NamedTuple):
    """Images of one class.

    Args:
        images: float32 in [0, 1], `(count, channels, height, width)`, on the CPU.
        nfe: number of function evaluations (how often the U-Net ran), mean over the batches.
    """

    images: torch.Tensor
    nfe: float


def draw_samples(
    pipe: FunLoraPipeline,
    class_id: int,
    count: int,
    *,
    purpose: str,
    seed: int,
    batch_size: int,
    solver: str,
    num_inference_steps: int,
    tolerance: float = 1e-5,
    guidance: Guidance | None = None,
    guidance_scale: float = 1.0,
) -> Samples:
    """Images of one class, repeatable to the bit on one machine and thread count.

    Args:
        pipe: knows the class.
        class_id: the class.
        count: how many.
        purpose: part of the seed, so that images for one use are not those of another.
        seed: of the run.
        batch_size: images at once; another batch size gives other images.
        solver, num_inference_steps, guidance, guidance_scale: as in the pipeline.
        tolerance: rtol and atol of "dopri5".

    Raises:
        ValueError: less than one image, in all or at once; and what the pipeline refuses.
    """
    check_at_least_one("count", count)
    check_at_least_one("batch_size", batch_size)
    parts, evaluations = [], []
    with cached_weights(pipe.unet):
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            # One generator on the CPU for a batch: the noise is the same on every device.
            generator = generator_for(seed, purpose, class_id, start)
            output = pipe(
                [class_id] * size,
                num_inference_steps=num_inference_steps,
                solver=solver,
                rtol=tolerance,
                atol=tolerance,
                generator=generator,
                output_type="pt",
                guidance=guidance,
                guidance_scale=guidance_scale,
            )
            parts.append(torch.as_tensor(output.images, device="cpu"))
            evaluations.append(output.nfe)
    return Samples(torch.cat(parts), mean(evaluations))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert floats in [0, 1] to uint8 0..255, same shape."""
    return (images * 255).round().to(torch.uint8)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; equal for bit-identical tensors only."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    # As bytes, since numpy has no bfloat16.
    digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
