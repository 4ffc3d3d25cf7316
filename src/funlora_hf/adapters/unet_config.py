"""What arguments of a U-Net or a scheduler, read from a file, may ask for before anything is built of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.checks import shortened


# Edge of an image; diffusers' largest U-Nets have 256.
MOST_SAMPLE_SIZE = 4096
# Of each other number, such as channels.
MOST_NUMBER = 2**16
# Modules are built one by one, also on the meta device: a count of them takes time before it takes memory.
MOST_LAYERS = 64
MOST_CLASSES = 2**24
_LIMITS = {
    "sample_size": MOST_SAMPLE_SIZE,
    "layers_per_block": MOST_LAYERS,
    "mid_block_layers": MOST_LAYERS,
    "num_class_embeds": MOST_CLASSES,
}


def check_unet_config(config: Mapping[str, Any], *, field: str) -> None:
    """
    Raise a ValueError unless every number, alone or in a list, is below a limit, and no list is longer than one.

    Args:
        config: arguments of a UNet2DModel.
        field: what they are called in the error.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"`{field}` is a {type(config).__name__}, expected a mapping of UNet2DModel arguments.")
    check_sizes(config, field=field)


def check_sizes(config: Mapping[str, Any], *, field: str) -> None:
    """The same of any component's arguments."""
    for name, value in config.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if len(entries) > MOST_LAYERS:
            raise ValueError(f"`{field}.{name}` has {len(entries)} entries, expected {MOST_LAYERS} at most.")
        most = _LIMITS.get(name, MOST_NUMBER)
        for entry in entries:
            # Written so that NaN is refused, too.
            if isinstance(entry, (int, float)) and not -most <= entry <= most:
                raise ValueError(
                    f"`{field}.{name}` has {shortened(repr(entry), 100)}, expected numbers of {most} at most."
                )
