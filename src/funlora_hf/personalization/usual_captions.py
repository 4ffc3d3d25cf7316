"""Captions without any concept: what a base should go on doing, and what usual text is."""

from __future__ import annotations

import torch

from ..utils.seeds import generator_for
from .tiny.scenes import all_told, caption


# Of the tiny base, drawn from all 432 captions of plain shapes, whose words its reader can check.
_TINY = 72


def usual_captions(*, tiny: bool) -> list[str]:
    """Return captions, always the same: of the tiny base's scenes, or of things that any base knows. Source: [ours]."""
    if tiny:
        plain = [caption(one) for one in all_told() if one.size is not None]
        order = torch.randperm(len(plain), generator=generator_for(0, "usual captions"))[:_TINY]
        return [plain[index] for index in order]
    nouns = ("bicycle", "house", "tree", "bird", "chair", "boat")
    places = ("in the snow", "on the beach", "in a city", "on a wooden table")
    return [f"a photo of a {noun} {place}" for noun in nouns for place in places]
