"""Families of text-to-image pipelines, a class for each: all in which one differs from the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor
from torch.nn import functional

from ..tuner.targets import decoder_middle, linear_names


# By the names under which the pipelines take them.
Prompt = dict[str, Tensor]
# States `(n, length, width)` of each text encoder, and pooled ones `(n, width)` or a mask `(n, length)` if they are needed.
Encoded = Mapping[str, tuple[Tensor, ...]]

UNET_LAYERS = {
    "kv": r"\.attn2\.to_[kv]",
    "cross": r"\.attn2\.(to_[qkv]|to_out\.0)",
    "attention": r"\.attn[12]\.(to_[qkv]|to_out\.0)",
}
# Joint attention: its projections of the text stand for cross-attention. `attn2`, in some blocks of SD 3.5, reads the image only. Flux's
# single blocks have one projection for both, which is neither.
JOINT_LAYERS = {
    "kv": r"\.attn\.add_[kv]_proj",
    "cross": r"\.attn\.(add_[qkv]_proj|to_add_out)",
    "attention": r"\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "convolutions": r"\.(attn\.to_out\.0|ff\.net\.2)",
}


def last(encoder: Any, ids: Tensor, pad_id: int) -> tuple[Tensor, ...]:
    """Return the last states for ids `(n, length)`, and the pooled ones of a CLIP."""
    out = encoder(ids)
    return (out[0],) if (pooled := out.get("pooler_output")) is None else (out[0], pooled)


def last_but_one(encoder: Any, ids: Tensor, pad_id: int) -> tuple[Tensor, ...]:
    """Return the states before the last layer of a CLIP, and the projected pooled ones if it has a projection."""
    out = encoder(ids, output_hidden_states=True)
    pooled = getattr(out, "text_embeds", None)
    return (out.hidden_states[-2],) if pooled is None else (out.hidden_states[-2], pooled)


def masked(encoder: Any, ids: Tensor, pad_id: int) -> tuple[Tensor, ...]:
    """Return the last states of a text encoder that does not read padding, and the mask of what it reads."""
    mask = (ids != pad_id).long()
    return encoder(ids, attention_mask=mask)[0], mask


def call(denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt, **more: Any) -> Tensor:
    """Return what a denoiser predicts, for `Family.predict`."""
    states = prompt["prompt_embeds"]
    return denoiser(noisy, timestep=timesteps, encoder_hidden_states=states, return_dict=False, **more)[0]


class Family:
    """A family of pipelines, and for a pipeline one of its instances. A subclass in `FAMILIES` is all that a further family needs."""

    name: ClassVar[str]
    pipeline: ClassVar[Any]  # its class in diffusers
    settings: ClassVar[Mapping[str, Any]] = {}  # what its constructor takes besides its parts
    kept_settings: ClassVar[tuple[str, ...]] = ()  # names of those that are taken over from a pipeline's config
    denoiser_name: ClassVar[str] = "transformer"
    # The text encoders, in the pipeline's order, and how each reads ids `(n, length)`, given the tokenizer's id of padding.
    encoders: ClassVar[Mapping[str, Callable[[Any, Tensor, int], tuple[Tensor, ...]]]]
    optional_encoder: ClassVar[str | None] = None  # without which the pipeline draws, too
    lengths: ClassVar[Mapping[str, int]] = {}  # tokens that the pipeline reads, for text encoders that could read more
    # Ends of names, by the kinds of `TextToImageModel.layers`; without "convolutions", those of a U-Net.
    layers: ClassVar[Mapping[str, str]]
    layerwise: ClassVar[bool] = False  # whether tokens may have rows for each cross-attention layer
    kv_reads_states: ClassVar[bool] = False  # whether the layers "kv" read the states of the text themselves
    embeds_guidance: ClassVar[bool] = False  # whether guidance is an input, so that no step sees the empty prompt
    arguments: ClassVar[Mapping[str, Any]] = {}  # with which a call of the pipeline reads prompts as they are

    def __init__(self, pipe: Any) -> None:
        self.config: Any = getattr(pipe, self.denoiser_name).config
        self.size: Any = self.config.get("sample_size")  # height and width of native latents
        self.patch_size: int = self.config.get("patch_size", 1)  # of what the denoiser reads as one token, in latents
        self.vae_scale_factor: int = pipe.vae_scale_factor
        self.kept = {name: pipe.config[name] for name in self.kept_settings}

    @staticmethod
    def cleaned(text: str) -> str:
        """Return a text as the pipeline gives it to a tokenizer."""
        return text

    def prompt(self, encoded: Encoded) -> Prompt:
        """Put together what the text encoders return, by their names, as the pipeline does."""
        return {"prompt_embeds": encoded["text_encoder"][0]}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        """Call the denoiser as the pipeline does, with latents `(b, c, h, w)` and prompt in its precision."""
        return call(denoiser, noisy, timesteps, prompt)

    def find_layers(self, denoiser: Any, kind: str) -> list[str]:
        """As `TextToImageModel.layers`."""
        if kind not in self.layers:
            return decoder_middle(denoiser)
        names = [name for name in linear_names(denoiser) if re.search(f"{self.layers[kind]}$", name)]
        if kind != "convolutions":
            return names
        blocks = 1 + max(int(name.split(".")[1]) for name in names)
        middle = range(blocks // 3, max(2 * blocks // 3, blocks // 3 + 1))
        return [name for name in names if int(name.split(".")[1]) in middle]


class StableDiffusion(Family):
    name, pipeline, denoiser_name = "sd", diffusers.StableDiffusionPipeline, "unet"
    settings: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    encoders: ClassVar = {"text_encoder": last}
    layers, layerwise, kv_reads_states = UNET_LAYERS, True, True


class StableDiffusionXL(Family):
    name, pipeline, denoiser_name = "sdxl", diffusers.StableDiffusionXLPipeline, "unet"
    settings: ClassVar = {"add_watermarker": False}
    kept_settings = ("force_zeros_for_empty_prompt",)
    encoders: ClassVar = {"text_encoder": last_but_one, "text_encoder_2": last_but_one}
    layers, kv_reads_states = UNET_LAYERS, True

    def prompt(self, encoded: Encoded) -> Prompt:
        states = torch.cat([found[0] for found in encoded.values()], dim=-1)
        return {"prompt_embeds": states, "pooled_prompt_embeds": encoded["text_encoder_2"][1]}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        size = [side * self.vae_scale_factor for side in noisy.shape[-2:]]
        # Original size, corner of the crop, size: images are cropped before.
        ids = noisy.new_tensor([[*size, 0, 0, *size]]).expand(len(noisy), -1)
        added = {"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": ids}
        return call(denoiser, noisy, timesteps, prompt, added_cond_kwargs=added)


class StableDiffusion3(Family):
    name, pipeline = "sd3", diffusers.StableDiffusion3Pipeline
    encoders: ClassVar = {"text_encoder": last_but_one, "text_encoder_2": last_but_one, "text_encoder_3": last}
    optional_encoder = "text_encoder_3"
    lengths: ClassVar = {"text_encoder_3": 256}
    layers = JOINT_LAYERS

    def prompt(self, encoded: Encoded) -> Prompt:
        both = zip(encoded["text_encoder"], encoded["text_encoder_2"], strict=True)
        clip, pooled = (torch.cat(parts, dim=-1) for parts in both)
        if "text_encoder_3" in encoded:
            t5 = encoded["text_encoder_3"][0]
        else:
            t5 = clip.new_zeros(len(clip), self.lengths["text_encoder_3"], self.config.joint_attention_dim)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"prompt_embeds": torch.cat([clip, t5.to(clip.dtype)], dim=-2), "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        return call(denoiser, noisy, timesteps, prompt, pooled_projections=prompt["pooled_prompt_embeds"])


class PixArt(Family):
    name, pipeline = "pixart", diffusers.PixArtAlphaPipeline
    encoders: ClassVar = {"text_encoder": masked}
    lengths: ClassVar = {"text_encoder": 120}
    layers: ClassVar = {**UNET_LAYERS, "convolutions": r"\.(attn1\.to_out\.0|ff\.net\.2)"}
    arguments: ClassVar = {"clean_caption": False, "use_resolution_binning": False}

    @staticmethod
    def cleaned(text: str) -> str:
        return text.lower().strip()

    def prompt(self, encoded: Encoded) -> Prompt:
        return dict(zip(("prompt_embeds", "prompt_attention_mask"), encoded["text_encoder"], strict=True))

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        height, width = (side * self.vae_scale_factor for side in noisy.shape[-2:])
        # Only models for 1024 pixels read these.
        sizes = {"resolution": [height, width], "aspect_ratio": [height / width]}
        added = {name: noisy.new_tensor([one]).expand(len(noisy), -1) for name, one in sizes.items()}
        mask = prompt["prompt_attention_mask"]
        found = call(denoiser, noisy, timesteps, prompt, encoder_attention_mask=mask, added_cond_kwargs=added)
        # It also predicts a variance, which the pipeline leaves out.
        return found[:, : noisy.shape[1]]


class PixArtSigma(PixArt):
    name, pipeline = "pixart_sigma", diffusers.PixArtSigmaPipeline
    lengths: ClassVar = {"text_encoder": 300}


class Flux(Family):
    name, pipeline = "flux", diffusers.FluxPipeline
    encoders: ClassVar = {"text_encoder": last, "text_encoder_2": last}
    lengths: ClassVar = {"text_encoder_2": 512}
    layers, embeds_guidance = JOINT_LAYERS, True

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        # The pipeline packs 2 x 2 latents into a token, of which its transformer knows nothing, nor of a size.
        self.size, self.patch_size = pipe.default_sample_size, 2

    def prompt(self, encoded: Encoded) -> Prompt:
        return {"prompt_embeds": encoded["text_encoder_2"][0], "pooled_prompt_embeds": encoded["text_encoder"][1]}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        """The place of 2 x 2 latents is `(0, row, column)`; a word's is 0. Times are from 0 to 1."""
        size = [side // 2 for side in noisy.shape[-2:]]
        places = [torch.arange(side, device=noisy.device, dtype=noisy.dtype) for side in (1, *size)]
        more = {
            "pooled_projections": prompt["pooled_prompt_embeds"],
            "img_ids": torch.cartesian_prod(*places),
            "txt_ids": noisy.new_zeros(prompt["prompt_embeds"].shape[1], 3),
        }
        if self.config.guidance_embeds:
            # Of 1 in training, as in the README of diffusers' DreamBooth script for Flux.
            more["guidance"] = noisy.new_ones(len(noisy))
        packed = functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
        found = call(denoiser, packed, timesteps / 1000, prompt, **more)
        return functional.pixel_shuffle(found.transpose(1, 2).unflatten(2, size), 2)


FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, PixArt, PixArtSigma, Flux)


def family_of(pipeline: Any, shown: str) -> type[Family]:
    """Return the family of a pipeline's class, or of this class's name. A ValueError, which begins with `shown`, for others."""
    for family in FAMILIES:
        if pipeline in (family.pipeline, family.pipeline.__name__):
            return family
    known = ", ".join(family.pipeline.__name__ for family in FAMILIES)
    raise ValueError(f"{shown} is a {getattr(pipeline, '__name__', pipeline)}, expected one of: {known}.")
