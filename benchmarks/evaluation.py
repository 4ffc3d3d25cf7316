"""A forward in evaluation on the paper's U-Net: adapters against the base, and a mixed batch against one class."""

from __future__ import annotations

from contextlib import nullcontext
from time import perf_counter

import torch
from backbone import adapted, batch, paper_unet
from interleaved import Comparison, Findings, compare, main

from funlora_hf import cached_weights, mixed_batch


def measure() -> Findings:
    torch.set_grad_enabled(False)
    mixed = mixture()
    return Findings([one_adapter(kept=True), one_adapter(kept=False), *mixed.rows], facts=mixed.facts)


def one_adapter(size: int = 8, *, kept: bool) -> Comparison:
    """One active adapter against the base, its weights kept or computed in every forward."""
    base = paper_unet().eval()
    model = adapted(paper_unet(), "x").eval()
    inputs = batch(size)
    sides = {"one adapter": lambda: model(**inputs), "base": lambda: base(**inputs)}
    name = f"one adapter active / base, batch {size}, {'inside' if kept else 'outside'} cached_weights"
    with cached_weights(model) if kept else nullcontext():
        return compare(name, sides, rounds=21, goal="<= 1.01" if kept else "")


def mixture(classes: int = 16, size: int = 32) -> Findings:
    """A batch of many classes against a batch of one, each with the weights that its first forward has made."""
    names = [f"class_{number}" for number in range(classes)]
    model, alone = adapted(paper_unet(), *names).eval(), adapted(paper_unet(), "x").eval()
    inputs = batch(size)
    # As the pipeline has them: sorted by class.
    mixed = [name for name in names for _ in range(size // classes)]
    with mixed_batch(model, mixed), cached_weights(alone):
        started = perf_counter()
        model(**inputs)
        first = perf_counter() - started
        sides = {f"{classes} classes": lambda: model(**inputs), "one class": lambda: alone(**inputs)}
        row = compare(f"{classes} classes in {size} / one class, weights kept", sides, rounds=7, goal="<= 1.10")
    return Findings(
        [row], facts={f"seconds of the first forward of {classes} classes, which makes the weights": first}
    )


if __name__ == "__main__":
    main(__doc__, measure, __file__)
