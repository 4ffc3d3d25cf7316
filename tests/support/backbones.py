"""U-Nets on the meta device: shapes without memory, and forward passes without arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn


# The paper's backbones (arXiv 2510.02631)
CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "dropout": 0.1,
    "num_class_embeds": 10,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
IMAGENET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 384, 512),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "num_class_embeds": 20,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SMALL_VARIANTS = {
    "plain": {},
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "two layers": {"layers_per_block": 2},
    "one block": {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    "resampling by resnets": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no middle block": {"mid_block_type": None},
    "three blocks": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "skip blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
}
# Of UNet2DConditionModel, whose default blocks hold convolutions in their attentions, too
CONDITION = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CONDITION_VARIANTS = {
    "cross attention": {},
    "two transformer layers": {"transformer_layers_per_block": 2},
    "linear projections": {"use_linear_projection": True},
    "middle block of three resnets": {"mid_block_type": "UNetMidBlock2D"},
    "no middle block": {"mid_block_type": None},
    "simple cross attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
    "self attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "k blocks": {
        "block_out_channels": (64, 64),
        "time_embedding_dim": 64,
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
    },
    "image hint": {"addition_embed_type": "image_hint", "encoder_hid_dim": 16, "in_channels": 7},
}
UNETS = {
    "paper's cifar": (UNet2DModel, CIFAR),
    "paper's imagenet": (UNet2DModel, IMAGENET),
    **{name: (UNet2DModel, {**SMALL, **variant}) for name, variant in SMALL_VARIANTS.items()},
    **{f"condition, {n}": (UNet2DConditionModel, {**CONDITION, **v}) for n, v in CONDITION_VARIANTS.items()},
}


def build(name: str, **overrides: Any) -> nn.Module:
    """One of `UNETS` on the meta device."""
    cls, config = UNETS[name]
    with torch.device("meta"):
        return cls(**{**config, **overrides})


def inputs(unet: nn.Module) -> dict[str, Any]:
    """Arguments for a forward of one of these U-Nets."""
    config, device = unet.config, unet.conv_in.weight.device
    # The hint adds its four channels to the sample.
    hint = config.get("addition_embed_type") == "image_hint"
    channels = config.in_channels - 4 if hint else config.in_channels
    arguments = {
        "sample": torch.zeros(1, channels, config.sample_size, config.sample_size, device=device),
        "timestep": torch.zeros(1, device=device),
    }
    if config.num_class_embeds:
        arguments["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    if isinstance(unet, UNet2DConditionModel):
        arguments["encoder_hidden_states"] = torch.zeros(1, 2, config.cross_attention_dim, device=device)
    if hint:
        edge = 8 * config.sample_size
        arguments["added_cond_kwargs"] = {
            "image_embeds": torch.zeros(1, config.encoder_hid_dim, device=device),
            "hint": torch.zeros(1, 3, edge, edge, device=device),
        }
    return arguments


def executed(unet: nn.Module) -> list[str]:
    """Names of the Conv2d in the order in which a forward runs them, each time that it runs them."""
    names = []
    handles = [
        module.register_forward_pre_hook(partial(lambda name, *_: names.append(name), name))
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        unet(**inputs(unet))
    for handle in handles:
        handle.remove()
    return names
