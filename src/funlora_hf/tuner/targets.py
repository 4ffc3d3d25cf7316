"""Find the layers of a model that an adapter may target, and its default targets, by names and structure of modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..tuner_base.wrappers import has_class, plain_modules, without_peft


ALL_CONV = "all-conv"
UNETS = {"UNet2DModel", "UNet2DConditionModel"}

# Projections that `fuse_qkv_projections` adds to an attention of diffusers, and the projections that each one replaces.
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}

# In order of execution; only some U-Nets have `add_embedding` (with convolutions if it embeds an image hint).
_PARTS = ("add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")


def check_is_called(name: str, attention: nn.Module) -> None:
    """Raise a ValueError if an attention of diffusers does not call a projection: an adapter there would have no effect.

    Args:
        name: name of the projection in the model.
        attention: the attention that has this projection.
    """
    called, uncalled, calls_fused = _projections(attention)
    if name.rpartition(".")[2] in uncalled:
        raise ValueError(
            f"Target module {name} is not called, since the projections of its attention are {'' if calls_fused else 'not '}"
            f"fused: target {', '.join(called)} instead, or call "
            f"`{'un' if calls_fused else ''}fuse_qkv_projections` first."
        )


def _projections(attention: Any) -> tuple[list[str], list[str], bool]:
    """Return the projections that an attention calls, those that it does not, and whether it calls the fused ones.

    Only fused projections and the projections that they replace are listed.
    """
    fused = [layer for layer in FUSED_PROJECTIONS if layer in attention._modules]
    parts = [part for layer in fused for part in FUSED_PROJECTIONS[layer]]
    # In the class `Attention`, the processor decides: the fused layers stay in a model after it is unfused.
    calls_fused = getattr(attention, "fused_projections", False) and (
        not has_class(attention, "Attention") or "Fused" in type(attention.processor).__name__
    )
    return (fused, parts, True) if calls_fused else (parts, fused, False)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions of diffusers in a model, by name."""
    return {name: module for name, module in plain_modules(model) if hasattr(module, "fused_projections")}


def projection_names(attention: nn.Module) -> list[str]:
    """Return the names of the Linear layers that an attention of diffusers calls, such as "to_q" and "to_out.0"."""
    _, uncalled, _ = _projections(attention)
    return [name for name in linear_names(attention) if name not in uncalled]


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all Linear layers of a model in the order of `named_modules`, wrapped by adapters or not."""
    return list(dict.fromkeys(name for name, module in plain_modules(model) if isinstance(module, nn.Linear)))


def conv_names(model: nn.Module) -> list[str]:
    """Return the names of all Conv2d of a model in the order of `named_modules`, wrapped by adapters or not."""
    return list(dict.fromkeys(name for name, module in plain_modules(model) if isinstance(module, nn.Conv2d)))


def knows_order(model: nn.Module) -> bool:
    """Whether `unet_conv_names` is correct for this model: a diffusers U-Net for 2D images with its standard parts.

    With `dual_cross_attention` it is not: a setting of each block decides which of two transformers runs first.
    """
    unet = without_peft(model)
    return (
        has_class(unet, *UNETS)
        and all(name.partition(".")[0] in _PARTS for name in conv_names(unet))
        and not any(has_class(module, "DualTransformer2DModel") for module in unet.modules())
    )


def unet_conv_names(unet: nn.Module) -> list[str]:
    """Return the names of all Conv2d of a U-Net (see `knows_order`) in order of execution, the paper's numbering.

    `named_modules` lists the decoder before the middle block, and the attentions of a block before the resnets with
    which they alternate. In a resnet the shortcut is the last module and runs last; upsamplers and downsamplers run
    after the resnets and attentions of their block.

    Source: Table I [exact].
    """

    def position(name: str) -> tuple[int, ...]:
        part, *rest = name.split(".")
        if part not in ("down_blocks", "mid_block", "up_blocks"):
            return (_PARTS.index(part),)
        block = 0
        within: tuple[int, ...]
        if part != "mid_block":
            block, *rest = int(rest[0]), *rest[1:]
        if rest[0] in ("resnets", "attentions"):
            # The same in the middle block, which begins with a resnet.
            within = (0, int(rest[1]), rest[0] == "attentions")
        else:
            # Up blocks with skips register `resnet_up` before `skip_conv`, and run it after.
            within = (1, rest[0] == "resnet_up")
        return (_PARTS.index(part), block, *within)

    # sorted() is stable: in all other cases, the order of registration is the order of execution.
    return sorted(conv_names(unet), key=position)


def decoder(unet: nn.Module) -> list[str]:
    """Return the names of the Conv2d of a U-Net's up blocks in order of execution. Source: [ours], the paper has ranges."""
    return [name for name in unet_conv_names(unet) if name.startswith("up_blocks.")]


def decoder_middle(unet: nn.Module) -> list[str]:
    """Return the names of the paper's layers, the middle of the decoder, for any U-Net of diffusers, in order of execution.

    The decoder's N resnets are numbered in order of execution from 0; the rule takes resnets N//3 .. 3N//4 - 1 and the
    upsamplers after them. On the paper's CIFAR backbone, conv1 and conv2 of the first resnet are left out, so that the
    selection is exactly the paper's range 40..54; on its ImageNet-100 backbone the rule gives 40..56.

    Source: Tables I and V [exact] for the paper's two backbones; the rule for others is [ours].
    """
    unet = without_peft(unet)
    blocks: Any = unet.up_blocks
    resnets = [(i, j) for i, block in enumerate(blocks) for j in range(len(block.resnets))]
    chosen = resnets[len(resnets) // 3 : max(3 * len(resnets) // 4, len(resnets) // 3 + 1)]
    prefixes = [f"up_blocks.{i}.resnets.{j}." for i, j in chosen]
    prefixes += [f"up_blocks.{i}.upsamplers." for i, j in chosen if j == len(blocks[i].resnets) - 1]
    names = [name for name in decoder(unet) if name.startswith(tuple(prefixes))]
    if _is_paper_cifar_backbone(unet):
        names = [name for name in names if name not in (f"{prefixes[0]}conv1", f"{prefixes[0]}conv2")]
    return names


def _is_paper_cifar_backbone(unet: nn.Module) -> bool:
    config: Any = unet.config
    return (
        tuple(config.block_out_channels) == (128, 256, 256, 256)
        and config.layers_per_block == 2
        and tuple(config.down_block_types) == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
        and tuple(config.up_block_types) == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    )
