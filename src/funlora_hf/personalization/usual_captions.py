"""Captions without any concept: what a base should go on doing, and what usual text is."""

from __future__ import annotations

from .tiny.scenes import USUAL, plain_captions


def usual_captions(*, tiny: bool) -> list[str]:
    """Return captions, always the same: of the tiny base's scenes, or of things that any base knows. Source: [ours]."""
    if tiny:
        # Of plain shapes, whose words its reader can check.
        return plain_captions()[:USUAL]
    nouns = ("bicycle", "house", "tree", "bird", "chair", "boat")
    places = ("in the snow", "on the beach", "in a city", "on a wooden table")
    return [f"a photo of a {noun} {place}" for noun in nouns for place in places]
