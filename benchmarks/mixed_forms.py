"""A mixed batch in one convolution: a convolution for every adapter, or one in groups, by the size of the layer.

`FunLoraConv2d` takes groups up to `LARGEST_GROUPED` channels in times channels out, for kernels larger than 1x1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from interleaved import Comparison, compare, main
from torch import nn

from funlora_hf import FunLoraConfig, mixed_batch
from funlora_hf.tuner import FunLoraConv2d, layer


SIZES = ((16, 8), (32, 8), (64, 4), (64, 16), (128, 8), (256, 8))
BATCHES = ((4, 8), (16, 2))


def measure() -> list[Comparison]:
    return [forms(channels, size, adapters, images) for channels, size in SIZES for adapters, images in BATCHES]


def forms(channels: int, size: int, adapters: int, images: int) -> Comparison:
    """Forward and backward; how many times as long a convolution for every adapter takes."""
    names = [f"class_{number}" for number in range(adapters)]
    base = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    adapted = FunLoraConv2d(base, names[0], FunLoraConfig(function="identity", init_weights=False))
    for name in names[1:]:
        adapted.update_layer(name, FunLoraConfig(function="identity", init_weights=False))
    adapted.set_adapter(names)
    x = torch.randn(adapters * images, channels, size, size, requires_grad=True)

    def step(largest_grouped: int) -> Callable[[], None]:
        def run() -> None:
            layer.LARGEST_GROUPED = largest_grouped
            with mixed_batch(adapted, [name for name in names for _ in range(images)]):
                adapted(x).sum().backward()

        return run

    name = f"{channels} channels, {size}x{size}, kernel 3x3, {adapters} adapters with {images} images"
    default = layer.LARGEST_GROUPED
    try:
        return compare(name, {"one by one": step(0), "in groups": step(channels**2)}, rounds=7, calls=3)
    finally:
        layer.LARGEST_GROUPED = default


if __name__ == "__main__":
    main(__doc__, measure, __file__)
