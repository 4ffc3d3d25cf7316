"""Compiling the U-Net that is trained, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DModel
from torch._dynamo.exc import TorchDynamoException


# What a UNet2DModel is made of, whatever the kinds of its larger blocks.
COMPILED_BLOCKS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")
# Torch's own limit is 8, but each pair of widths and each resolution is a graph of its own, with and without adapters.
MOST_GRAPHS = 128


class CompilationError(RuntimeError):
    """torch.compile does not work here."""


def compile_blocks(unet: UNet2DModel, *, backend: str = "inductor") -> None:
    """Compile the blocks of a U-Net when they are first called; names and values of its parameters stay.

    Adapters may be put in and taken out afterwards. Those of equal shapes and names are compiled once.

    Args:
        unet: its blocks are compiled in place.
        backend: of torch.compile.
    """
    # By the old name, which later versions of torch know as well.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
    unet._repeated_blocks = list(COMPILED_BLOCKS)
    unet.compile_repeated_blocks(dynamic=False, backend=backend)


@contextmanager
def compilation_errors() -> Iterator[None]:
    """Says of an error of torch's compiler what to do about it.

    Raises:
        CompilationError: with torch's own words.
    """
    try:
        yield
    except TorchDynamoException as error:
        raise CompilationError(
            "`torch_compile` is set, and torch.compile failed on this device or with the compiler that it found: leave "
            f"--torch_compile out, or give it what it asks for. {type(error).__name__}: {error}"
        ) from error
