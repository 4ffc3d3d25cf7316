"""Text-to-image pipelines of diffusers with random weights, small enough for a test."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}


def make_model(name: str) -> nn.Module:
    """The model that denoises, of one of diffusers' classes; equal at each call."""
    torch.manual_seed(0)
    if name == "UNet2DConditionModel":
        return UNet2DConditionModel(**_UNET).eval()
    if name == "SDXL":
        return UNet2DConditionModel(
            **_UNET,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ).eval()
    if name == "SD3Transformer2DModel":
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
    if name == "FluxTransformer2DModel":
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        ).eval()
    if name == "DiTTransformer2DModel":
        return DiTTransformer2DModel(**_DIT, out_channels=8, num_embeds_ada_norm=1000).eval()
    return PixArtTransformer2DModel(**_DIT, out_channels=8, caption_channels=16, cross_attention_dim=16).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, sample_size=8, norm_num_groups=4).eval()


def _text_encoder() -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=8, projection_dim=16)).eval()


def _tokenizer() -> CLIPTokenizer:
    """Of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def make_pipeline(name: str) -> Any:
    """A pipeline "SD", which takes prompts, or "SDXL", "SD3", "Flux", "PixArt", "PixArtSigma" or "DiT", which take what a text encoder gives or labels."""
    torch.manual_seed(0)
    noise = DDIMScheduler(clip_sample=False, steps_offset=1)
    if name == "SD":
        pipe = StableDiffusionPipeline(
            unet=make_model("UNet2DConditionModel"),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            scheduler=noise,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif name == "SDXL":
        pipe = StableDiffusionXLPipeline(
            unet=make_model("SDXL"),
            vae=_vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            scheduler=noise,
        )
    elif name == "DiT":
        pipe = DiTPipeline(make_model("DiTTransformer2DModel"), _vae(), noise)
    elif name in ("PixArt", "PixArtSigma"):
        models = {"transformer": make_model("PixArtTransformer2DModel"), "vae": _vae()}
        kind = PixArtAlphaPipeline if name == "PixArt" else PixArtSigmaPipeline
        pipe = kind(tokenizer=None, text_encoder=None, scheduler=noise, **models)
    elif name == "SD3":
        pipe = StableDiffusion3Pipeline(
            transformer=make_model("SD3Transformer2DModel"),
            vae=_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            **dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]),
        )
    else:
        pipe = FluxPipeline(
            transformer=make_model("FluxTransformer2DModel"),
            vae=_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            **dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2")]),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def component(pipe: Any) -> nn.Module:
    """The model of a pipeline that denoises."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def arguments(pipe: Any) -> dict[str, Any]:
    """Of a call that takes two steps, from the same noise and prompt at each call."""
    generator = torch.Generator().manual_seed(1)
    prompt = {"prompt_embeds": torch.randn(1, 4, 16, generator=generator)}
    if not isinstance(pipe, StableDiffusionPipeline):
        prompt["pooled_prompt_embeds"] = torch.randn(1, 16, generator=generator)
    if not isinstance(pipe, FluxPipeline):
        prompt |= {f"negative_{name}": torch.zeros_like(value) for name, value in prompt.items()}
    size = 8 * pipe.vae_scale_factor
    sizes = {"num_inference_steps": 2, "height": size, "width": size}
    return {**prompt, **sizes, "output_type": "latent", "generator": generator}


def sample(pipe: Any, **kwargs: Any) -> torch.Tensor:
    """Latents of a call with `arguments`."""
    return pipe(**arguments(pipe), **kwargs).images
