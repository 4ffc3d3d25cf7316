"""Continual personalization of text-to-image models: one concept after another, from a few images each."""

from ..utils.quiet import quiet_loading


with quiet_loading():
    # transformers looks for torchvision at the first import of these.
    from diffusers import (  # noqa: F401
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPImageProcessor  # noqa: F401
