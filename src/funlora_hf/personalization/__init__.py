"""Continual personalization of text-to-image models: one concept after another, from a few images each."""

from .. import text_to_image  # noqa: F401 - it imports diffusers' pipelines quietly
from ..utils.quiet import quiet_loading


with quiet_loading():
    # transformers looks for torchvision at the first import.
    from transformers import CLIPImageProcessor  # noqa: F401
