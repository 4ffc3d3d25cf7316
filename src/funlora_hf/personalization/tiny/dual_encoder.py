"""A tiny CLIP that knows the scenes: what `clip_i` and `clip_t` use with the tiny base.

Its captions tell all of a composite, too ("red heart over blue square toy"), so it can tell one toy from another.

Source: [ours]; the architecture is CLIP's (arXiv 2103.00020).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from . import scenes
from .fitting import fit
from .reader import VALUES, as_tensor, attributes_of
from .scenes import Scene


def make_dual_encoder(tokenizer: CLIPTokenizer) -> tuple[CLIPModel, CLIPProcessor]:
    """Return an untrained model and its processor."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "num_hidden_layers": 2,
    }
    image = {"image_size": scenes.RESOLUTION, "patch_size": 8, "num_hidden_layers": 3}
    config = CLIPConfig(text_config={**sizes, **text, **ids}, vision_config={**sizes, **image}, projection_dim=64)
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(
        size={"shortest_edge": scenes.RESOLUTION},
        crop_size={"height": scenes.RESOLUTION, "width": scenes.RESOLUTION},
        image_mean=half,
        image_std=half,
    )
    return CLIPModel(config), CLIPProcessor(images, tokenizer)


def agreement(drawn: Sequence[Scene], told: Sequence[dict[str, int]]) -> torch.Tensor:
    """Say which captions are true of which scenes: (captions, scenes) bool.

    Args:
        told: by caption, what it tells as `attributes_of` gives it; -1 where it tells nothing.
    """
    true = torch.tensor([[attributes_of(scene)[name] for name in VALUES] for scene in drawn])
    said = torch.tensor([[one[name] for name in VALUES] for one in told])[:, None]
    return ((said == true) | (said == -1)).all(2)


def train_dual_encoder(
    tokenizer: CLIPTokenizer, *, steps: int, seed: int, batch: int = 96
) -> tuple[CLIPModel, CLIPProcessor]:
    """Train on fresh renderings; the target of a caption is the mean over all images of which it is true."""
    rng = random.Random(seed)
    model, processor = make_dual_encoder(tokenizer)

    def loss() -> torch.Tensor:
        drawn = [scenes.random_scene(rng, composites=0.6, concepts=True) for _ in range(batch)]
        captions, told = [], []
        for scene in drawn:
            said = attributes_of(scene)
            full, size, background = rng.random() < 0.8, rng.random() < 0.9, rng.random() < 0.8
            captions.append(
                scenes.caption(scene, rng.choice(scenes.OPENINGS), full=full, size=size, background=background)
            )
            if not full and scene.noun in scenes.COMPOSITES:
                said = dict.fromkeys(VALUES, -1) | {name: said[name] for name in ("noun", "background")}
            said |= {} if size else {"size": -1}
            said |= {} if background else {"background": -1}
            told.append(said)
        ids = tokenizer(captions, padding=True, return_tensors="pt")
        output = model(**ids, pixel_values=as_tensor(drawn).float() / 127.5 - 1)
        target = agreement(drawn, told).float()
        return sum(
            (
                torch.nn.functional.cross_entropy(logits, share / share.sum(1, keepdim=True))
                for logits, share in ((output.logits_per_text, target), (output.logits_per_image, target.T))
            ),
            start=torch.zeros(()),
        )

    model.train()
    fit("dual encoder", model.parameters(), loss, steps=steps, learning_rate=2e-3, ema_decay=0.99)
    return model.eval().requires_grad_(False), processor


@torch.no_grad()
def ranks_first(folder: Path, images: torch.Tensor, drawn: Sequence[Scene]) -> dict[str, float]:
    """Let a dual encoder choose among full captions and among images.

    Args:
        folder: of the model and its processor.
        images: (n, 3, 32, 32) uint8, of the n scenes `drawn`.

    Returns:
        `captions`: share of images whose most similar caption is true of them; `images`: share of captions whose most
        similar image shows what they tell.
    """
    model = CLIPModel.from_pretrained(folder)
    processor = CLIPProcessor.from_pretrained(folder)
    captions = [scenes.caption(scene, full=True) for scene in drawn]
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    logits = model(**inputs).logits_per_image
    true, number = agreement(drawn, [attributes_of(scene) for scene in drawn]), torch.arange(len(drawn))
    return {
        "captions": true[logits.argmax(1), number].float().mean().item(),
        "images": true[number, logits.argmax(0)].float().mean().item(),
    }
