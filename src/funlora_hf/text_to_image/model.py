"""The parts of a text-to-image pipeline, put together for training: from captions, with gradients to the rows of new tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..adapters.put_into_model import with_adapter_methods
from ..adapters.untrusted_base import check_shards
from ..utils.checks import check_choice, check_not_mistyped
from ..utils.quiet import quiet_loading
from .families import Prompt, family_of
from .layer_states import layer_states
from .objective import Objective
from .token_rows import ROW_ENCODERS, TokenRows, with_vectors, without_tokens


# What only some pipelines of these classes have, and none of them needs.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
LAYERS = ("kv", "cross", "attention", "convolutions")
_MOST_STATES = 128


class TextToImageModel(nn.Module):
    """A frozen pipeline of one of the `FAMILIES` as one module that predicts from captions.

    Adapters are put into `denoiser`, by `add_adapter` or `get_peft_model` (then assign the result to it); new tokens come by
    `add_rows`. Text encoders and VAE must stay as they are: they are always in evaluation mode, and text encoders run in their own
    precision, also under autocast, as they do when the pipeline draws.

    Args:
        pipe: the pipeline, whose modules are used, not copied.

    Attributes:
        family: "sd", "sdxl", "sd3", "pixart", "pixart_sigma" or "flux".
        traits: the `Family` of this name: all in which it differs from the others.
        denoiser: the pipeline's U-Net or transformer, which gets `add_adapter`.
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
        family = family_of(type(pipe), "`pipe`")
        Objective(pipe.scheduler)
        parts = {key: getattr(pipe, key) for key in family.encoders}
        if missing := [key for key, part in parts.items() if part is None and key != family.optional_encoder]:
            raise ValueError(f"`pipe` has no {' and no '.join(missing)}: load it with all text encoders.")
        self.traits = family(pipe)
        self.family, self.denoiser_name = family.name, family.denoiser_name
        self.denoiser: Any = with_adapter_methods(getattr(pipe, self.denoiser_name))
        self.text_encoders = nn.ModuleDict({key: part for key, part in parts.items() if part is not None})
        self.tokenizers = {key: getattr(pipe, _tokenizer(key)) for key in self.text_encoders}
        for key in self.row_tokenizers.keys() & family.lengths.keys():
            # T5's own limit is higher, but the pipeline cuts prompts here.
            tokenizer = self.tokenizers[key]
            tokenizer.model_max_length = min(tokenizer.model_max_length, family.lengths[key])
        self.vae: Any = pipe.vae
        self.scheduler = pipe.scheduler
        self.rows = None
        self.vae_scale_factor: int = pipe.vae_scale_factor
        self.patch_size, size = self.traits.patch_size, self.traits.size
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
        """Load a pipeline from a folder or from the Hub, its weights from safetensors files only.

        Args:
            name: folder or repository of a pipeline of one of the `FAMILIES`.
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
        family = family_of(kind, shown)
        options: dict[str, Any] = {"variant": variant, "use_safetensors": True, **family.settings}
        options |= {part: None for part in _LEFT_OUT if part in index}
        if drop_t5:
            if (t5 := family.optional_encoder) is None or t5 not in index:
                raise ValueError(f"`drop_t5` is True, expected False: {shown} is a {kind}, only SD3 has a T5 to drop.")
            options |= {t5: None, _tokenizer(t5): None}
        for part, value in index.items():
            # diffusers would import any library that is named here.
            if (
                isinstance(value, (list, tuple))
                and part not in options
                and value[0] not in ("diffusers", "transformers", None)
            ):
                raise ValueError(f"{shown} has {part!r} {value!r}, expected a class of diffusers or transformers.")
        folder = source if os.path.isdir(source) else family.pipeline.download(source, revision=revision, **options)
        for path in sorted(Path(folder).glob("*/*.index*.json")):
            if path.parent.name not in options and ".bin." not in path.name:
                check_shards(path)
        with quiet_loading():
            pipe = family.pipeline.from_pretrained(folder, torch_dtype=dtype, **options)
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
        """Add all new tokens of a run, once. SD3's T5 gets no rows; it reads captions without the tokens.

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
        if layerwise and not self.traits.layerwise:
            raise ValueError(
                f"The base is of the family {self.family!r}, expected 'sd': rows for each cross-attention layer, which this strategy has, "
                "are there for Stable Diffusion only. Take such a base, or another strategy."
            )
        layers = layer_states(encoders["text_encoder"], self.denoiser) if layerwise else None
        self.rows = TokenRows(encoders, tokenizers, tokens, num_vectors=num_vectors, layers=layers)
        self._states.clear()
        return self.rows

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Predict what the scheduler's denoiser predicts, `(b, c, h, w)`.

        Args:
            noisy: `(b, c, h, w)`, scaled latents with noise.
            timesteps: `(b,)`, from `Objective.times`.
            captions: b texts.
        """
        return self.denoise(noisy, timesteps, self.encode(captions))

    def encode(self, captions: Sequence[str]) -> Prompt:
        """Encode captions as the pipeline's `encode_prompt` does, with gradients to the rows that are trained.

        Captions without a new token are encoded once; the last 128 are kept.

        Returns:
            `prompt_embeds` `(b, length, width)`; for SDXL, SD3 and Flux also `pooled_prompt_embeds` `(b, width)`, for PixArt
            `prompt_attention_mask` `(b, length)`.
        """
        texts = list(dict.fromkeys(captions))
        with torch.autocast(self._device.type, enabled=False):
            prompt = self.traits.prompt({key: self._encode(key, texts) for key in self.tokenizers})
        trained = [row for row in self.rows.parameters() if row.requires_grad] if self.rows is not None else []
        if trained and not prompt["prompt_embeds"].requires_grad:
            # Gradients of 0: DDP waits for one of each parameter, and the optimizer's step must not depend on the processes' shares.
            prompt["prompt_embeds"] = prompt["prompt_embeds"] + 0 * sum(row.sum() for row in trained)
        order = [texts.index(caption) for caption in captions]
        return {name: value[order] for name, value in prompt.items()}

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Call the denoiser as the pipeline does; returns what `forward` does.

        Args:
            noisy, timesteps: as for `forward`.
            prompt: from `encode`, or from the pipeline's `encode_prompt` under the same names.
        """
        dtype = next(self.denoiser.parameters()).dtype
        prompt = {name: value.to(dtype) for name, value in prompt.items()}
        return self.traits.predict(self.denoiser, noisy.to(dtype), timesteps, prompt)

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
        for key in self.traits.encoders:
            parts[key] = getattr(self.text_encoders, key, None)
            parts[_tokenizer(key)] = self.tokenizers.get(key)
        pipe = self.traits.pipeline(**parts, **self.traits.settings, **self.traits.kept)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def layers(self, kind: str) -> list[str]:
        """Return names of the denoiser's layers, as they are without adapters, for `target_modules`.

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
        return self.traits.find_layers(self.denoiser, kind)

    @property
    def _device(self) -> torch.device:
        return next(self.text_encoders.parameters()).device

    def _encode(self, key: str, texts: list[str]) -> tuple[torch.Tensor, ...]:
        """States `(n, length, width)` of texts, and pooled ones `(n, width)` or a mask `(n, length)` if they are needed."""
        tokenizer = self.tokenizers[key]
        length = self.traits.lengths.get(key, tokenizer.model_max_length)
        texts = [self.traits.cleaned(text) for text in texts]
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
        return tuple(torch.stack(part) for part in zip(*(found[i] for i in range(len(texts))), strict=True))

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
        read = self.traits.encoders[key]
        return read(self.text_encoders[key], ids, self.tokenizers[key].pad_token_id)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._states.clear()  # another device or precision
        return super()._apply(*args, **kwargs)


def _tokenizer(encoder: str) -> str:
    """The name of a text encoder's tokenizer in a pipeline."""
    return encoder.replace("text_encoder", "tokenizer")
