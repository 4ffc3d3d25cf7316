"""Derive the seed of everything in a run from the run's seed."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *keys: str | int) -> int:
    """Derive a seed in [0, 2**63) for one purpose from a run's seed and keys, such as a phase's name and a step.

    The same keys give the same seed on every process and machine, also after a resume.
    """
    text = "/".join([str(seed), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *keys: str | int) -> torch.Generator:
    """Return a CPU generator with the derived seed; noise that is drawn on the CPU is the same for every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
