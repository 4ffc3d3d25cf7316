"""Compile the U-Net for training, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DModel
from torch._dynamo.exc import TorchDynamoException


# All larger blocks of a UNet2DModel consist of these.
COMPILED_BLOCKS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")
# The default of torch is 8, but each pair of widths and each resolution has its own graph, with and without adapters.
MOST_GRAPHS = 128


class CompilationError(RuntimeError):
    """torch.compile does not work here."""


def compile_blocks(unet: UNet2DModel, *, backend: str = "inductor") -> None:
    """Compile the blocks of a U-Net at their first call, with a `backend` of torch.compile.

    Names and values of its parameters stay. Adapters may be added and removed afterwards; those of equal shapes and names are
    compiled once.
    """
    # The old name, which later versions of torch also accept.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
    unet._repeated_blocks = list(COMPILED_BLOCKS)
    unet.compile_repeated_blocks(dynamic=False, backend=backend)


@contextmanager
def compilation_errors() -> Iterator[None]:
    """Add a remedy to an error of torch's compiler.

    Raises:
        CompilationError: with torch's message.
    """
    try:
        yield
    except TorchDynamoException as error:
        raise CompilationError(
            "`torch_compile` is set, and torch.compile failed on this device or with the compiler that it found: leave "
            f"--torch_compile out, or give it what it asks for. {type(error).__name__}: {error}"
        ) from error
