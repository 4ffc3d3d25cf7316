"""A thousand classes: making one live, and loading them all; on the paper's U-Net."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import torch
from backbone import adapted, config, paper_unet
from diffusers import UNet2DModel
from interleaved import Comparison, compare, main

from funlora_hf import AdapterBank


def measure() -> list[Comparison]:
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        return [activation(), against_peft(), loading(Path(folder))]


def activation(few: int = 10, many: int = 1000) -> Comparison:
    """Making a class live must not take longer the more of them there are."""
    sides = {f"{count:,} classes": switch(filled(count)) for count in (many, few)}
    return compare(f"make a class live, of {many:,} / of {few}", sides, rounds=21, calls=100, goal="1, at <= 0.2 ms")


def against_peft(count: int = 40) -> Comparison:
    """A bank against as many adapters in a PeftModel."""
    names = [f"class_{number}" for number in range(count)]
    model = adapted(paper_unet(), *names)
    following = itertools.cycle(names)
    sides = {"AdapterBank": switch(filled(count)), "set_adapter": lambda: model.set_adapter(next(following))}
    return compare(f"make a class live, of {count}: AdapterBank / PEFT", sides, rounds=11, calls=5)


def loading(folder: Path, count: int = 1000) -> Comparison:
    """All classes from a bank's file, against one adapter from its folder. Building the model is not counted."""
    bank = filled(count)
    bank.save(folder / "bank.safetensors")
    model = adapted(paper_unet(), "default")
    model.save_pretrained(os.fspath(folder / "one"))
    names = itertools.count()
    sides = {
        f"bank of {count:,}": lambda: AdapterBank.load(folder / "bank.safetensors", bank.model),
        "one by PEFT": lambda: model.load_adapter(os.fspath(folder / "one"), f"loaded_{next(names)}"),
    }
    return compare(f"load {count:,} classes / one by PEFT's load_adapter", sides, rounds=7, goal="<= 20 ms")


def filled(count: int, unet: UNet2DModel | None = None) -> AdapterBank:
    """A bank of classes with random numbers, on the paper's U-Net or another."""
    bank = AdapterBank(paper_unet() if unet is None else unet, config())
    for label in range(count):
        state = {key: torch.randn_like(value) for key, value in bank.live_tensors.items()}
        bank.add_tensors(state, class_label=label)
    return bank


def switch(bank: AdapterBank):
    """Makes one class after another live."""
    following = itertools.cycle(bank.classes)
    return lambda: bank.activate(next(following))


if __name__ == "__main__":
    main(__doc__, measure, __file__)
