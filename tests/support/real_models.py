"""Text-to-image models of diffusers by the configs of their public weights, without memory for their numbers.

Each config was written down from the `config.json` of the repository that is named; what it leaves out is diffusers' default.
"""

from __future__ import annotations

from functools import cache

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn


_TWO_CROSS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_MODELS = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "SD 1.5": (UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}, 859_520_964),
    # stabilityai/stable-diffusion-xl-base-1.0
    "SDXL": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *_TWO_CROSS),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
    # stabilityai/stable-diffusion-3-medium-diffusers
    "SD3 medium": (
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        2_028_328_000,
    ),
    # black-forest-labs/FLUX.1-dev
    "Flux.1 dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320),
    # PixArt-alpha/PixArt-XL-2-512x512
    "PixArt-alpha": (PixArtTransformer2DModel, {"sample_size": 64, "caption_channels": 4096}, 610_856_096),
    # facebook/DiT-XL-2-256
    "DiT-XL/2": (
        DiTTransformer2DModel,
        {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8},
        749_826_464,
    ),
}


@cache
def real_model(name: str) -> nn.Module:
    """The model that denoises, on the meta device; do not change it."""
    cls, config, parameters = _MODELS[name]
    with torch.device("meta"):
        model = cls(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    return model
