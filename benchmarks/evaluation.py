"""A forward in evaluation on the paper's U-Net: adapters against the base, and a mixed batch against one class."""

from __future__ import annotations

import torch
from backbone import adapted, batch, paper_unet
from interleaved import Comparison, compare, main

from funlora_hf import mixed_batch


def measure() -> list[Comparison]:
    torch.set_grad_enabled(False)
    return [one_adapter(), mixture()]


def one_adapter(size: int = 8) -> Comparison:
    """One active adapter against the base."""
    base = paper_unet().eval()
    model = adapted(paper_unet(), "x").eval()
    inputs = batch(size)
    sides = {"one adapter": lambda: model(**inputs), "base": lambda: base(**inputs)}
    return compare(f"one adapter active / base, batch {size}", sides, goal="<= 1.01")


def mixture(classes: int = 16, size: int = 32) -> Comparison:
    """A batch of many classes, whose weights are kept as while sampling, against a batch of one."""
    names = [f"class_{number}" for number in range(classes)]
    model = adapted(paper_unet(), *names).eval()
    inputs = batch(size)
    mixed = [names[sample % classes] for sample in range(size)]
    # Entering the context drops what an earlier one kept, so both sides stay inside one for the whole turn.
    forwards = 4

    def many() -> None:
        with mixed_batch(model, mixed):
            for _ in range(forwards):
                model(**inputs)

    def one() -> None:
        for _ in range(forwards):
            model(**inputs)

    sides = {f"{classes} classes": many, "one class": one}
    name = f"{classes} classes in {size} / one class, {forwards} forwards (as many evaluations of a sampling)"
    return compare(name, sides, rounds=3, goal="<= 1.10")


if __name__ == "__main__":
    main(__doc__, measure, __file__)
