"""Text-to-image pipelines of diffusers, put together for training: model, objective, rows of new tokens."""

from ..utils.quiet import quiet_loading


with quiet_loading():
    # transformers looks for torchvision at the first import of pipelines.
    from . import families  # noqa: F401
