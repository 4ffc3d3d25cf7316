"""Which convolutions of a U-Net an adapter takes when none are named. Knows modules by name and structure only."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import nn


ALL_CONV = "all-conv"


def conv_names(model: nn.Module) -> list[str]:
    """Names of all Conv2d of a model in the order of `named_modules`, also where adapters have wrapped them."""
    return [
        _without_wrapper(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and ".modules_to_save." not in name
    ]


def unet_conv_names(unet: UNet2DModel) -> list[str]:
    """Names of all Conv2d of a `UNet2DModel` in order of execution, which is the paper's numbering.

    `named_modules` lists the decoder before the middle block, and in a resnet the shortcut last, which is also where
    it runs; upsamplers and downsamplers run after the resnets and attentions of their block.

    Source: Table I [exact].
    """
    parts = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")

    def position(name: str) -> tuple:
        part, *rest = name.split(".")
        # The up blocks with skips register `resnet_up` before `skip_conv` and run it after.
        within = (int(rest[0]), "resnet_up" in rest) if part == "up_blocks" else ()
        return parts.index(part), *within

    # sorted() is stable: but for that, the order of registration is the order of execution inside a part.
    return sorted(conv_names(unet), key=position)


def decoder_middle(unet: UNet2DModel) -> list[str]:
    """The paper's layers, the middle of the decoder, carried over to any `UNet2DModel`.

    The decoder's N resnets are numbered in order of execution from 0; taken are the resnets N//3 .. 3N//4 - 1 and the
    upsamplers after them. On the paper's CIFAR backbone, conv1 and conv2 of the first are dropped, so that the
    selection is its range 40..54 exactly; on its ImageNet-100 backbone the rule gives 40..56.

    Returns:
        Names of Conv2d, in order of execution.

    Source: Tables I and V [exact] for the paper's two backbones; the rule for others is [ours].
    """
    resnets = [
        f"up_blocks.{i}.resnets.{j}" for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))
    ]
    chosen = resnets[len(resnets) // 3 : max(3 * len(resnets) // 4, len(resnets) // 3 + 1)]
    last_of_block = {f"up_blocks.{i}.resnets.{len(block.resnets) - 1}": i for i, block in enumerate(unet.up_blocks)}
    prefixes = [f"{name}." for name in chosen]
    prefixes += [f"up_blocks.{last_of_block[name]}.upsamplers." for name in chosen if name in last_of_block]
    names = [name for name in unet_conv_names(unet) if name.startswith(tuple(prefixes))]
    if _is_paper_cifar_backbone(unet):
        names = [name for name in names if name not in (f"{chosen[0]}.conv1", f"{chosen[0]}.conv2")]
    return names


def _is_paper_cifar_backbone(unet: UNet2DModel) -> bool:
    config = unet.config
    return (
        tuple(config.block_out_channels) == (128, 256, 256, 256)
        and config.layers_per_block == 2
        and tuple(config.down_block_types) == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
        and tuple(config.up_block_types) == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    )


def _without_wrapper(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))
