"""Merge one class of a pipeline into a plain U-Net, which diffusers loads without this package."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from diffusers.models import UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..utils.checks import listed
from ..utils.tensors import not_finite
from .pipeline import FunLoraPipeline


_CLASS_EMBEDDING = "class_embedding."
_BIAS = "time_embedding.linear_2.bias"


@torch.no_grad()
def merge_class(pipe: FunLoraPipeline, class_label: int | str) -> UNet2DModel:
    """Return a plain U-Net that generates one class as the pipeline does.

    The adapter is merged into the weights, and the class vector into the bias of the time embedding, to which the U-Net
    adds it. So the result takes no class labels, needs neither PEFT nor this package, and is as fast as the base.
    `UNet2DModel.from_pretrained` loads what its `save_pretrained` writes; dx/dsigma is `unet(sample, 1000 * sigma).sample`.

    Args:
        pipe ([`FunLoraPipeline`]): not changed. Merging takes the memory of up to two more U-Nets.
        class_label (`int` or `str`): a class of the base or of an adapter, by id or by name.

    Returns:
        [`UNet2DModel`]: in evaluation mode, with dtype and device of the base; it shares no tensor with the pipeline.
            Its outputs equal the pipeline's up to rounding in that dtype.

    Raises:
        ValueError: unknown class, adapters that are merged into the base already, a method that cannot be merged, weights that are
            not finite, or a U-Net that does not match its config.

    Source: [ours].

    Example:
        ```py
        >>> unet = merge_class(pipe, 7)
        >>> unet.save_pretrained("seven")
        >>> unet = UNet2DModel.from_pretrained("seven")
        ```
    """
    _check_exportable(pipe.unet)
    merged, row = pipe.merged_unet(class_label)
    tensors = merged.state_dict()
    embedding = merged.class_embedding
    if embedding is not None:
        _check_class_embedding(merged)
        if row is not None:
            bias, vector = tensors[_BIAS], embedding(row.to(embedding.weight.device))[0]
            wide = torch.promote_types(bias.dtype, torch.float32)
            tensors[_BIAS] = (bias.to(wide) + vector.to(wide)).to(bias.dtype)  # rounded once
    tensors |= _unfused(merged)
    if problems := not_finite(tensors):
        raise ValueError(f"Class {class_label!r} cannot be merged:\n{listed(problems)}")
    config = {name: value for name, value in merged.config.items() if not name.startswith("_")}
    unet = _plain_unet({**config, "num_class_embeds": None}, tensors)
    return unet.to(merged.device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature


def _check_exportable(unet: nn.Module) -> None:
    if not isinstance(unet, UNet2DModel) or type(unet).forward is not UNet2DModel.forward:
        raise ValueError(
            f"`pipe.unet` is a {type(unet).__name__}, expected a UNet2DModel of diffusers: another class may use its class "
            "vector in another way. If it is compiled, put the original model into the pipeline."
        )
    if any(layer.merged for layer in unet.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError("Adapters are merged into the base's weights: call `unmerge_adapter` first.")
    if any(tensor.is_meta for tensor in unet.state_dict().values()):
        raise ValueError(
            "`pipe.unet` has tensors on the meta device, as under `enable_sequential_cpu_offload`: call "
            "`pipe.remove_all_hooks()`, or load the pipeline again, first."
        )


def _check_class_embedding(unet: UNet2DModel) -> None:
    """`emb = linear_2(...) + class_embedding(labels)` must be true, with nothing in between."""
    embedding, time = unet.class_embedding, unet.time_embedding
    kind = unet.config["class_embed_type"]
    if kind is not None or type(embedding) is not nn.Embedding:
        raise ValueError(
            f"`class_embed_type` is {kind!r} and the class embedding a {type(embedding).__name__}, "
            "expected None and an Embedding: only a vector of the class alone can become part of a bias. Use the pipeline."
        )
    plain = type(time) is TimestepEmbedding and type(time.linear_2) is nn.Linear
    if not plain or time.linear_2.bias is None or time.post_act is not None:
        raise ValueError(
            "`time_embedding` does not end in a Linear with a bias, which is the only place for the class vector in a plain "
            "U-Net. Use the pipeline."
        )


def _unfused(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Return separate weights of query, key and value for attentions that compute them in one layer, `to_qkv`."""
    tensors: dict[str, torch.Tensor] = {}
    for path, module in unet.named_modules():
        if isinstance(module, Attention) and isinstance(module.processor, FusedAttnProcessor2_0):
            names = ("to_q", "to_k", "to_v")
            sizes = [getattr(module, name).out_features for name in names]
            for kind, tensor in module.to_qkv.state_dict().items():
                parts = tensor.split(sizes)
                tensors |= {f"{path}.{name}.{kind}": part.clone() for name, part in zip(names, parts, strict=True)}
    return tensors


def _plain_unet(config: dict, tensors: dict[str, torch.Tensor]) -> UNet2DModel:
    """A U-Net of this config made of these tensors; those of the class embedding and of fused attentions are not used."""
    # Building one may draw random numbers, but not from the caller's generator.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        unet = UNet2DModel.from_config(config)
    names = unet.state_dict().keys()
    left = [n for n in tensors.keys() - names if not n.startswith(_CLASS_EMBEDDING) and ".to_qkv." not in n]
    missing = names - tensors.keys()
    if left or missing:
        raise ValueError(
            f"`pipe.unet` does not match its config: it also has {sorted(left)}, and lacks {sorted(missing)}. A plain U-Net "
            "of this config would compute something else."
        )
    unet.load_state_dict({name: tensors[name].contiguous() for name in names}, assign=True)
    return unet.eval()
