"""Text encoders with random weights, for pipelines of text_to_image.py that have none."""

from __future__ import annotations

from typing import Any

import torch
from text_to_image import make_pipeline
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)


# By the family of `TextToImageModel`.
PIPELINES = {"sd": "SD", "sdxl": "SDXL", "sd3": "SD3", "pixart": "PixArt", "flux": "Flux"}
_SIZES = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def make_prompted(name: str, *, limit: int = 8) -> Any:
    """As `make_pipeline`, with all that `encode_prompt` needs for prompts of `limit` tokens; equal at each call."""
    pipe = make_pipeline(name)
    torch.manual_seed(1)
    parts: dict[str, Any] = {}
    if name == "SD":
        parts = {"text_encoder": _clip(CLIPTextModel, limit, 16)}
    elif name == "SDXL":
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        parts = {encoder: _clip(kind, limit, 8) for encoder, kind in kinds.items()}
    elif name == "SD3":
        encoders = [_clip(CLIPTextModelWithProjection, limit, 8, 8) for _ in range(2)]
        parts = {"text_encoder": encoders[0], "text_encoder_2": encoders[1], "text_encoder_3": _t5()}
        parts["tokenizer_3"] = ByT5Tokenizer(model_max_length=8)
    elif name.startswith("PixArt"):
        parts = {"text_encoder": _t5(), "tokenizer": ByT5Tokenizer(model_max_length=512)}
    elif name == "Flux":
        # Pooled at the highest id, as FLUX.1's.
        parts = {"text_encoder": _clip(CLIPTextModel, limit, 16, eos_token_id=2), "text_encoder_2": _t5()}
        parts["tokenizer_2"] = ByT5Tokenizer(model_max_length=512)
    for encoder in [part for part in parts if part.startswith("text_encoder")]:
        if (tokenizer := encoder.replace("text_encoder", "tokenizer")) not in parts:
            parts[tokenizer] = make_pipeline("SD").tokenizer
            parts[tokenizer].model_max_length = limit
    if name in ("SD3", "Flux"):
        pipe.vae.register_to_config(shift_factor=0.1)  # the pipelines need one
    pipe.register_modules(**parts)
    return pipe


def _clip(kind: Any, limit: int, hidden: int, projected: int = 16, **given: Any) -> Any:
    sizes = {"hidden_size": hidden, "projection_dim": projected, "max_position_embeddings": limit}
    return kind(CLIPTextConfig(**_SIZES, **sizes, **given)).eval()


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
