"""A tiny text-to-image base, its judges and its concepts, all in the wheel; `making` makes them again."""

from __future__ import annotations

from pathlib import Path


def tiny_base() -> Path:
    """Return the folder of the tiny base, a `StableDiffusionPipeline`."""
    return Path(__file__).parent / "files" / "base"


def tiny_dual_encoder() -> Path:
    """Return the folder of the tiny `CLIPModel` and its `CLIPProcessor`."""
    return Path(__file__).parent / "files" / "dual_encoder"


def tiny_concepts() -> Path:
    """Return the file of the five concepts."""
    return Path(__file__).parent / "concepts" / "concepts.json"
