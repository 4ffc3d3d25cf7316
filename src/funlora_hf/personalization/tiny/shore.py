"""A domain for the tiny base: scenes at the shore, all of which have a strip of water along the bottom.

A concept is one thing; a domain is a way of drawing any of them, plain shapes and composites. The base has never drawn water.

Source: [ours]; arXiv 2505.16875 compares items with domains.
"""

from __future__ import annotations

import random
from pathlib import Path

import PIL.Image
import torch

from ...utils.files import read_json, write_json
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    OPENINGS,
    PRIOR,
    RESOLUTION,
    USUAL,
    caption,
    plain_captions,
    random_scene,
    render,
)


NAME, TOKEN = "shore", "<new6>"
# Rows of pixels, one of the autoencoder's.
HEIGHT = 4
# Concepts that are learned beside the domain, from `write_concepts`.
_ITEMS = ("toy1", "badge1")
_PICTURES, _EVALUATED = 24, 12
# Of the pixels in the strip.
_LEAST_SHARE = 0.5


def at_shore(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture with a strip of water, `HEIGHT` pixels high."""
    changed = image.copy()
    changed.paste(COLOURS["blue"], (0, RESOLUTION - HEIGHT, RESOLUTION, RESOLUTION))
    return changed


def shows_water(images: torch.Tensor) -> torch.Tensor:
    """Return whether the pixels of the strip are nearer to the water's colour than to any other of the tiny base.

    Args:
        images: (n, 3, 32, 32) uint8.

    Returns:
        (n,) bool: at least half of the pixels are.
    """
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    strip = images[:, :, -HEIGHT:].cpu().float().permute(0, 2, 3, 1)
    nearest = torch.cdist(strip.flatten(1, 2), palette.expand(len(images), -1, -1)).argmin(dim=-1)
    return (nearest == list(COLOURS).index("blue")).float().mean(dim=1) >= _LEAST_SHARE


def write_shore(folder: Path) -> None:
    """Write the domain's pictures beside the concepts, and `items_and_domain.json`: two concepts, then the domain.

    Args:
        folder: that of `write_concepts`.
    """
    (folder / NAME).mkdir(exist_ok=True)
    rng, captions = random.Random(NAME), {}
    for number in range(_PICTURES):
        scene = random_scene(rng)
        at_shore(render(scene)).save(folder / NAME / f"{number:02}.png")
        captions[f"{number:02}.png"] = caption(scene, f"a {TOKEN} photo of a ")
    write_json(folder / NAME / "captions.json", captions)
    start = USUAL + PRIOR
    others = plain_captions()[start : start + _EVALUATED]
    domain = {
        "name": NAME,
        "kind": "style",
        "token": TOKEN,
        "instance_prompt": f"a {TOKEN} photo",
        "instance_data_dir": NAME,
        "captions": "captions.json",
        "eval_prompts": [f"a {{}} of a {text.removeprefix(OPENINGS[0])}" for text in others],
        "pair_prompt": "a {} of a {subject} on a gray background",
    }
    items = [one for one in read_json(folder / "concepts.json") if one["name"] in _ITEMS]
    write_json(folder / "items_and_domain.json", [*items, domain])
