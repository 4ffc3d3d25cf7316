"""The parts of a text-to-image pipeline, put together for training: from captions, with gradients to the rows of new tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from torch.nn import functional

from ..adapters.put_into_model import with_adapter_methods
from ..adapters.untrusted_base import check_shards
from ..tuner.targets import decoder_middle, linear_names
from ..utils.checks import check_choice, check_not_mistyped
from ..utils.quiet import quiet_loading
from .layer_states import layer_states
from .objective import Objective
from .token_rows import ROW_ENCODERS, TokenRows, with_vectors, without_tokens


_PIPELINES: dict[str, Any] = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "pixart": PixArtAlphaPipeline,
    "pixart_sigma": PixArtSigmaPipeline,
    "flux": FluxPipeline,
}
_SD3_T5 = "text_encoder_3"
_ENCODERS = {
    "sd": ROW_ENCODERS[:1],
    "sdxl": ROW_ENCODERS,
    "sd3": (*ROW_ENCODERS, _SD3_T5),
    "pixart": ROW_ENCODERS[:1],
    "pixart_sigma": ROW_ENCODERS[:1],
    "flux": ROW_ENCODERS,
}
# The text encoder that is a T5, and the tokens that it reads: the default of the pipeline.
_T5: dict[str, tuple[str | None, int]] = {
    "sd3": (_SD3_T5, 256),
    "pixart": ("text_encoder", 120),
    "pixart_sigma": ("text_encoder", 300),
    "flux": ("text_encoder_2", 512),
}
# Of the embedded guidance in training, as in the README of diffusers' DreamBooth script for Flux.
_FLUX_GUIDANCE = 1.0
_PIXART = ("pixart", "pixart_sigma")
# What only some pipelines of these classes have, and none of them needs.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
LAYERS = ("kv", "cross", "attention", "convolutions")
_UNET_LAYERS = {
    "kv": r"\.attn2\.to_[kv]",
    "cross": r"\.attn2\.(to_[qkv]|to_out\.0)",
    "attention": r"\.attn[12]\.(to_[qkv]|to_out\.0)",
}
_PIXART_LAYERS = {**_UNET_LAYERS, "convolutions": r"\.(attn1\.to_out\.0|ff\.net\.2)"}
# Joint attention: its projections of the text stand for cross-attention. `attn2`, in some blocks of SD 3.5, reads the image only. Flux's
# single blocks have one projection for both, which is neither.
_JOINT_LAYERS = {
    "kv": r"\.attn\.add_[kv]_proj",
    "cross": r"\.attn\.(add_[qkv]_proj|to_add_out)",
    "attention": r"\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "convolutions": r"\.(attn\.to_out\.0|ff\.net\.2)",
}
_MOST_STATES = 128

# By the names under which the pipelines take them.
Prompt = dict[str, torch.Tensor]


class TextToImageModel(nn.Module):
    """
    A frozen pipeline of Stable Diffusion ("sd"), SDXL ("sdxl"), SD3 ("sd3"), PixArt-alpha ("pixart"), PixArt-Sigma ("pixart_sigma") or
    Flux ("flux") as one module that predicts from captions.

    Adapters are put into `denoiser`, by `add_adapter` or `get_peft_model` (then assign the result to it); new tokens come by
    `add_rows`. Text encoders and VAE must stay as they are: they are always in evaluation mode, and text encoders run in their own
    precision, also under autocast, as they do when the pipeline draws.

    Args:
        pipe: the pipeline, whose modules are used, not copied.

    Attributes:
        family: "sd", "sdxl", "sd3", "pixart", "pixart_sigma" or "flux".
        denoiser: a `UNet2DConditionModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel` or `PixArtTransformer2DModel`, which gets
            `add_adapter`.
        denoiser_name: its name in the pipeline, "unet" or "transformer".
        text_encoders, tokenizers: by the names of the pipeline's text encoders, in its order.
        vae, scheduler: those of the pipeline.
        rows: a `TokenRows` after `add_rows`, before it None.
        resolution: width and height of native images, in pixels.
        latent_shape: `(channels, height, width)` of their latents.
        patch_size: height and width of what the denoiser reads as one token, in latents; 1 for a U-Net.

    Raises:
        ValueError: another pipeline, one without a text encoder, or one whose denoiser predicts the sample.
    """

    rows: TokenRows | None

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        found = [family for family, kind in _PIPELINES.items() if type(pipe) is kind]
        if not found:
            raise ValueError(_refusal("`pipe`", type(pipe).__name__))
        Objective(pipe.scheduler)
        self.family = found[0]
        self._t5, self._t5_length = _T5.get(self.family, (None, 0))
        parts = {key: getattr(pipe, key) for key in _ENCODERS[self.family]}
        if missing := [key for key, part in parts.items() if part is None and key != _SD3_T5]:
            raise ValueError(f"`pipe` has no {' and no '.join(missing)}: load it with all text encoders.")
        self.denoiser_name = "unet" if self.family in ("sd", "sdxl") else "transformer"
        self.denoiser: Any = with_adapter_methods(getattr(pipe, self.denoiser_name))
        self.text_encoders = nn.ModuleDict({key: part for key, part in parts.items() if part is not None})
        self.tokenizers = {
            key: getattr(pipe, key.replace("text_encoder", "tokenizer"))
            for key, part in parts.items()
            if part is not None
        }
        if self._t5 in ROW_ENCODERS:
            # T5's own limit is higher, but the pipeline cuts prompts here.
            tokenizer = self.tokenizers[self._t5]
            tokenizer.model_max_length = min(tokenizer.model_max_length, self._t5_length)
        self.vae: Any = pipe.vae
        self.scheduler = pipe.scheduler
        self.rows = None
        self.vae_scale_factor: int = pipe.vae_scale_factor
        self._force_zeros = getattr(pipe.config, "force_zeros_for_empty_prompt", None)
        is_flux = self.family == "flux"
        # Flux's pipeline packs 2 x 2 latents into a token, of which its transformer knows nothing, nor of a size.
        self.patch_size: int = 2 if is_flux else self.denoiser.config.get("patch_size", 1)
        size = pipe.default_sample_size if is_flux else self.denoiser.config.sample_size
        if not isinstance(size, int):
            raise ValueError(f"`{self.denoiser_name}.sample_size` is {size!r}, expected a number: square latents.")
        if getattr(self.vae.config, "latents_mean", None) is not None:
            raise ValueError("`vae.latents_mean` is set, expected None: latents are only shifted and scaled.")
        self.resolution = size * self.vae_scale_factor
        self.latent_shape = (self.vae.config.latent_channels, size, size)
        self._states: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        variant: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_t5: bool = False,
        field: str = "pretrained_model_name_or_path",
    ) -> TextToImageModel:
        """
        Load a pipeline from a folder or from the Hub, its weights from safetensors files only.

        Args:
            name: folder or repository of a `StableDiffusionPipeline`, `StableDiffusionXLPipeline`, `StableDiffusion3Pipeline`,
                `PixArtAlphaPipeline`, `PixArtSigmaPipeline` or `FluxPipeline`.
            revision: branch, tag or commit of a repository.
            variant: such as "fp16", for files with this word in their name.
            device: where to put the model.
            dtype: of all weights but those of new tokens.
            drop_t5: whether to leave out the T5 of SD3.
            field: the argument that names the pipeline, for errors.

        Raises:
            OSError: no such pipeline, or one without safetensors files.
            ValueError: another kind of pipeline, or `drop_t5` for one that needs its T5 or has none; before weights are downloaded.
        """
        source = os.fspath(name)
        check_not_mistyped(field, source, revision=revision)
        index = dict(DiffusionPipeline.load_config(source, revision=revision))
        kind, shown = index.get("_class_name"), f"`{field}` {source!r}"
        pipeline = next((one for one in _PIPELINES.values() if one.__name__ == kind), None)
        if pipeline is None:
            raise ValueError(_refusal(shown, str(kind)))
        options: dict[str, Any] = {"variant": variant, "use_safetensors": True}
        options |= {part: None for part in _LEFT_OUT if part in index}
        if pipeline is StableDiffusionPipeline:
            options["requires_safety_checker"] = False
        if drop_t5:
            if _SD3_T5 not in index:
                raise ValueError(f"`drop_t5` is True, expected False: {shown} is a {kind}, only SD3 has a T5 to drop.")
            options |= {_SD3_T5: None, "tokenizer_3": None}
        for part, value in index.items():
            # diffusers would import any library that is named here.
            if (
                isinstance(value, (list, tuple))
                and part not in options
                and value[0] not in ("diffusers", "transformers", None)
            ):
                raise ValueError(f"{shown} has {part!r} {value!r}, expected a class of diffusers or transformers.")
        folder = source if os.path.isdir(source) else pipeline.download(source, revision=revision, **options)
        for path in sorted(Path(folder).glob("*/*.index*.json")):
            if path.parent.name not in options and ".bin." not in path.name:
                check_shards(path)
        with quiet_loading():
            pipe = pipeline.from_pretrained(folder, torch_dtype=dtype, **options)
        return cls(pipe).to(device)

    def train(self, mode: bool = True) -> TextToImageModel:
        """As for any module, but text encoders (T5 has dropout) and VAE stay in evaluation mode."""
        super().train(mode)
        self.text_encoders.eval()
        self.vae.eval()
        return self

    @property
    def row_tokenizers(self) -> dict[str, Any]:
        """Those that read new tokens: all but that of SD3's T5, which reads longer prompts, too."""
        return {key: self.tokenizers[key] for key in ROW_ENCODERS if key in self.tokenizers}

    def add_rows(self, tokens: Mapping[str, str], *, num_vectors: int = 1, layerwise: bool = False) -> TokenRows:
        """
        Add all new tokens of a run, once. SD3's T5 gets no rows; it reads captions without the tokens.

        With `layerwise`, tokens have rows for each cross-attention layer, and `encode` returns the states for all layers side by side.

        Args, Returns, Raises: as for `TokenRows`, without the encoders; a ValueError also for a second call, and for layer-wise rows of
            another family than "sd".
        """
        if self.rows is not None:
            raise ValueError(
                f"The model has rows for {', '.join(self.rows.tokens)} already: add all tokens in one call."
            )
        tokenizers = self.row_tokenizers
        encoders = {key: self.text_encoders[key] for key in tokenizers}
        layers = None
        if layerwise:
            if self.family != "sd":
                raise ValueError(
                    f"The base is of the family {self.family!r}, expected 'sd': rows for each cross-attention layer, which this strategy has, "
                    "are there for Stable Diffusion only. Take such a base, or another strategy."
                )
            layers = layer_states(encoders["text_encoder"], self.denoiser)
        self.rows = TokenRows(encoders, tokenizers, tokens, num_vectors=num_vectors, layers=layers)
        self._states.clear()
        return self.rows

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Predict what the scheduler's denoiser predicts.

        Args:
            noisy: `(b, c, h, w)`, scaled latents with noise.
            timesteps: `(b,)`, from `Objective.times`.
            captions: b texts.

        Returns:
            `(b, c, h, w)`.
        """
        return self.denoise(noisy, timesteps, self.encode(captions))

    def encode(self, captions: Sequence[str]) -> Prompt:
        """
        Encode captions as the pipeline's `encode_prompt` does, with gradients to the rows that are trained.

        Captions without a new token are encoded once; the last 128 are kept.

        Returns:
            `prompt_embeds` `(b, length, width)`; for SDXL, SD3 and Flux also `pooled_prompt_embeds` `(b, width)`, for PixArt
            `prompt_attention_mask` `(b, length)`.
        """
        texts = list(dict.fromkeys(captions))
        prompt = self._prompt(texts)
        trained = [row for row in self.rows.parameters() if row.requires_grad] if self.rows is not None else []
        if trained and not prompt["prompt_embeds"].requires_grad:
            # Gradients of 0: DDP waits for one of each parameter, and the optimizer's step must not depend on the processes' shares.
            prompt["prompt_embeds"] = prompt["prompt_embeds"] + 0 * sum(row.sum() for row in trained)
        order = [texts.index(caption) for caption in captions]
        return {name: value[order] for name, value in prompt.items()}

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Call the denoiser as the pipeline does.

        Args:
            noisy, timesteps: as for `forward`.
            prompt: from `encode`, or from the pipeline's `encode_prompt` under the same names.

        Returns:
            As `forward`.
        """
        dtype = next(self.denoiser.parameters()).dtype
        prompt = {name: value.to(dtype) for name, value in prompt.items()}
        if self.family == "flux":
            return self._denoise_packed(noisy.to(dtype), timesteps, prompt)
        inputs: dict[str, Any] = {"encoder_hidden_states": prompt["prompt_embeds"], "timestep": timesteps}
        size = [side * self.vae_scale_factor for side in noisy.shape[-2:]]
        if self.family == "sd3":
            inputs["pooled_projections"] = prompt["pooled_prompt_embeds"]
        elif self.family == "sdxl":
            # Original size, corner of the crop, size: images are cropped before.
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=noisy.device)
            embeds = prompt["pooled_prompt_embeds"]
            inputs["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": ids.expand(len(noisy), -1)}
        elif self.family in _PIXART:
            inputs["encoder_attention_mask"] = prompt["prompt_attention_mask"]
            # Only models for 1024 pixels read these.
            sizes = {"resolution": [size], "aspect_ratio": [[size[0] / size[1]]]}
            inputs["added_cond_kwargs"] = {
                name: torch.tensor(value, dtype=dtype, device=noisy.device).expand(len(noisy), -1)
                for name, value in sizes.items()
            }
        prediction = self.denoiser(noisy.to(dtype), **inputs, return_dict=False)[0]
        # PixArt also predicts a variance, which the pipeline leaves out.
        return prediction[:, : noisy.shape[1]]

    def _denoise_packed(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Flux: 2 x 2 latents are a token, whose place is `(0, row, column)`; a word's is 0. Times are from 0 to 1."""
        size = [side // 2 for side in noisy.shape[-2:]]
        places = [torch.arange(side, device=noisy.device, dtype=noisy.dtype) for side in (1, *size)]
        inputs = {
            "hidden_states": functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
            "timestep": timesteps / 1000,
            "encoder_hidden_states": prompt["prompt_embeds"],
            "pooled_projections": prompt["pooled_prompt_embeds"],
            "img_ids": torch.cartesian_prod(*places),
            "txt_ids": noisy.new_zeros(prompt["prompt_embeds"].shape[1], 3),
        }
        if self.denoiser.config.guidance_embeds:
            inputs["guidance"] = noisy.new_full((len(noisy),), _FLUX_GUIDANCE)
        prediction = self.denoiser(**inputs, return_dict=False)[0]
        return functional.pixel_shuffle(prediction.transpose(1, 2).unflatten(2, size), 2)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, each image by itself, so that no batch changes a bit.

        Args:
            images: `(n, 3, h, w)`, uint8; height and width are multiples of `vae_scale_factor`.

        Returns:
            Two tensors `(n, c, h / vae_scale_factor, w / vae_scale_factor)`, float32: some VAEs overflow in float16.

        Raises:
            ValueError: images of another type or shape.
        """
        sides = images.shape[2:]
        if images.dtype != torch.uint8 or images.dim() != 4 or any(side % self.vae_scale_factor for side in sides):
            raise ValueError(
                f"`images` are {images.dtype} of shape {tuple(images.shape)}, expected torch.uint8 of (n, 3, height, width), height and "
                f"width multiples of {self.vae_scale_factor}."
            )
        config, dtype = self.vae.config, self.vae.dtype
        if dtype != torch.float32:
            self.vae.float()
        try:
            with torch.autocast(self._device.type, enabled=False):
                found = [self.vae.encode(one[None].to(self._device).float() / 127.5 - 1).latent_dist for one in images]
        finally:
            if dtype != torch.float32:
                self.vae.to(dtype)
        mean, std = torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])
        shift = getattr(config, "shift_factor", None) or 0.0
        return (mean - shift) * config.scaling_factor, std * config.scaling_factor

    def pipeline(self) -> DiffusionPipeline:
        """Return the stock pipeline of these very modules, without a progress bar; `prompt_arguments` makes its prompts."""
        parts: dict[str, Any] = {self.denoiser_name: self.denoiser, "vae": self.vae, "scheduler": self.scheduler}
        for key in _ENCODERS[self.family]:
            parts[key] = getattr(self.text_encoders, key, None)
            parts[key.replace("text_encoder", "tokenizer")] = self.tokenizers.get(key)
        if self.family == "sd":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        elif self.family == "sdxl":
            parts |= {"force_zeros_for_empty_prompt": self._force_zeros, "add_watermarker": False}
        pipe = _PIPELINES[self.family](**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def layers(self, kind: str) -> list[str]:
        """
        Return names of the denoiser's layers, as they are without adapters, for `target_modules`.

        Args:
            kind: "kv", the projections of the text in cross-attention; "cross", all of cross-attention; "attention", all of
                attention; "convolutions", those of the decoder's middle. SD3 has joint attention, in which the projections of the text
                count as cross-attention; so has Flux, in its double blocks. Transformers have no such convolutions: the output of the
                image's attention, `to_out.0`, and `ff.net.2` of the blocks' middle third instead.

        Raises:
            ValueError: another kind.

        Source: "convolutions" as in arXiv 2510.02631 for U-Nets, for transformers [ours].
        """
        check_choice("kind", kind, LAYERS)
        if self.denoiser_name == "unet":
            return decoder_middle(self.denoiser) if kind == "convolutions" else self._linear(_UNET_LAYERS[kind])
        names = self._linear((_PIXART_LAYERS if self.family in _PIXART else _JOINT_LAYERS)[kind])
        if kind != "convolutions":
            return names
        blocks = self.denoiser.config.num_layers
        middle = range(blocks // 3, max(2 * blocks // 3, blocks // 3 + 1))
        return [name for name in names if int(name.split(".")[1]) in middle]

    def _linear(self, pattern: str) -> list[str]:
        return [name for name in linear_names(self.denoiser) if re.search(f"{pattern}$", name)]

    @property
    def _device(self) -> torch.device:
        return next(self.text_encoders.parameters()).device

    def _prompt(self, texts: list[str]) -> Prompt:
        """What the text encoders make of texts, put together as the pipeline does."""
        with torch.autocast(self._device.type, enabled=False):
            encoded = {key: self._encode(key, texts) for key in self.tokenizers}
        states = {key: found[0] for key, found in encoded.items()}
        second = [found[1] for found in encoded.values() if len(found) == 2]
        if self.family in _PIXART:
            return {"prompt_embeds": states["text_encoder"], "prompt_attention_mask": second[0]}
        if self.family == "flux":
            return {"prompt_embeds": states["text_encoder_2"], "pooled_prompt_embeds": second[0]}
        clip = torch.cat([states[key] for key in ROW_ENCODERS if key in states], dim=-1)
        if self.family == "sd":
            return {"prompt_embeds": clip}
        if self.family == "sdxl":
            return {"prompt_embeds": clip, "pooled_prompt_embeds": second[0]}
        t5 = states.get(_SD3_T5)
        if t5 is None:
            t5 = clip.new_zeros(len(texts), self._t5_length, self.denoiser.config.joint_attention_dim)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip, t5.to(clip.dtype)], dim=-2),
            "pooled_prompt_embeds": torch.cat(second, dim=-1),
        }

    def _encode(self, key: str, texts: list[str]) -> list[torch.Tensor]:
        """States `(n, length, width)` of texts, and pooled ones `(n, width)` or a mask `(n, length)` if they are needed."""
        tokenizer = self.tokenizers[key]
        length = self._t5_length if key == self._t5 else tokenizer.model_max_length
        if self.family in _PIXART:
            texts = [text.lower().strip() for text in texts]
        if key in ROW_ENCODERS:
            texts = with_vectors(texts, tokenizer)
        elif self.rows is not None:
            texts = [without_tokens(text, self.rows.tokens) for text in texts]
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(texts, **options).input_ids.to(self._device)
        is_new = [False] * len(texts)
        if self.rows is not None and key in ROW_ENCODERS:
            is_new = self.rows.read_by(key, ids).tolist()
        with_rows = [i for i, new in enumerate(is_new) if new]
        found = (
            dict(zip(with_rows, zip(*self._run(key, ids[with_rows]), strict=True), strict=True)) if with_rows else {}
        )
        for i, text in enumerate(texts):
            if i not in found:
                found[i] = self._kept(key, text, ids[i : i + 1])
        return [torch.stack(part) for part in zip(*(found[i] for i in range(len(texts))), strict=True)]

    def _kept(self, key: str, text: str, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """States of one text that never change."""
        states = self._states.pop((key, text), None)
        if states is None:
            # What is kept in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                states = tuple(part[0] for part in self._run(key, ids.clone()))
            if len(self._states) >= _MOST_STATES:
                del self._states[next(iter(self._states))]
        self._states[key, text] = states
        return states

    def _run(self, key: str, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self.text_encoders[key]
        if self.family in _PIXART:
            mask = (ids != self.tokenizers[key].pad_token_id).long()
            return encoder(ids, attention_mask=mask)[0], mask
        if self.family == "sd" or key == self._t5:
            return (encoder(ids)[0],)
        if self.family == "flux":
            out = encoder(ids)
            return out.last_hidden_state, out.pooler_output
        out = encoder(ids, output_hidden_states=True)
        pooled = getattr(out, "text_embeds", None)
        return (out.hidden_states[-2],) if pooled is None else (out.hidden_states[-2], pooled)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._states.clear()  # another device or precision
        return super()._apply(*args, **kwargs)


def _refusal(field: str, kind: str) -> str:
    known = ", ".join(pipeline.__name__ for pipeline in _PIPELINES.values())
    return f"{field} is a {kind}, expected one of: {known}."
