"""A training step on the paper's U-Net: FunLoRA against the floor, and against training all weights.

Floor: the same U-Net with the weights of the 15 adapted convolutions trainable and no adapter. FunLoRA's gradient passes
through theirs, so it cannot need less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from backbone import adapted, batch, floor, paper_unet
from interleaved import Comparison, compare, main

from funlora_hf import mixed_batch
from funlora_hf.tuner import layer


def measure() -> list[Comparison]:
    return [
        against("floor", 8, lambda: floor(paper_unet()), goal="<= 1.04"),
        against("floor", 32, lambda: floor(paper_unet()), goal="<= 1.02"),
        against("all weights", 8, paper_unet, goal="<= 0.90"),
        mixture(),
        plain_product(),
    ]


def against(other: str, size: int, make: Callable[[], torch.nn.Module], *, goal: str) -> Comparison:
    """Forward, backward and an update by Adam."""
    sides = {"FunLoRA": step(adapted(paper_unet(), "x"), size), other: step(make(), size)}
    return compare(f"FunLoRA / {other}, batch {size}", sides, rounds=11, goal=goal)


def mixture(classes: int = 16, size: int = 32) -> Comparison:
    """A batch of many classes, all of which learn, against a batch of one."""
    names = [f"class_{number}" for number in range(classes)]
    model = adapted(paper_unet(), *names)
    model.set_requires_grad(names)
    # As the trainer has them: sorted by class.
    mixed = [name for name in names for _ in range(size // classes)]
    many = step(model, size, lambda: mixed_batch(model, mixed))
    sides = {f"{classes} classes": many, "one class": step(adapted(paper_unet(), "x"), size)}
    return compare(f"{classes} classes in {size} / one class", sides, rounds=7, goal="<= 1.25")


def plain_product(size: int = 8) -> Comparison:
    """The exact form of `identity`, which needs no gradient of the weight, against the one that multiplies the weight."""
    multiplying = adapted(paper_unet(), "x", function="identity")
    exact = adapted(paper_unet(), "x", function="identity")
    sides = {
        "scaling inputs and outputs": step(exact, size),
        "multiplying the weight": step(multiplying, size, weights_multiplied),
    }
    return compare(f"identity by its exact form / by the weight, batch {size}", sides, rounds=7)


@contextmanager
def weights_multiplied() -> Iterator[None]:
    """No layer is large enough for the exact form."""
    before, layer.SMALLEST_SIZE = layer.SMALLEST_SIZE, sys.maxsize
    try:
        yield
    finally:
        layer.SMALLEST_SIZE = before


def step(
    model: torch.nn.Module, size: int, context: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[], None]:
    """One training step of a model, whenever it is called; forward and backward run in a context."""
    model.train()
    inputs, target = batch(size), torch.randn(size, 3, 32, 32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        with context():
            torch.nn.functional.mse_loss(model(**inputs).sample, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main(__doc__, measure, __file__)
