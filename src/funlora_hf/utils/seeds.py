"""Seeds of runs, and seeds of everything in a run, which are derived from the run's."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *keys: str | int) -> int:
    """A seed in [0, 2**63), from a run's, for one purpose, such as a phase's name and a step: the same keys give the same seed on
    every process, machine and resume."""
    text = "/".join([str(seed), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator with that seed; noise drawn on the CPU is the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
