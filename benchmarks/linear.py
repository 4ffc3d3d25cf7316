"""A training step of one Linear layer: FunLoRA against LoRA, at the sizes of SD and SDXL (1,280) and of Flux (3,072).

Forward, backward to the adapter and the input, and an update by Adam. LoRA has r = 4, the default of diffusers' scripts; FunLoRA r = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from interleaved import Comparison, Findings, bytes_saved, comparison, main, take_turns
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from funlora_hf import FunLoraConfig


SIZES = (1280, 3072)
TOKENS = (256, 4096)
TARGET = ["0"]


def configs() -> dict[str, PeftConfig]:
    return {
        "cosine": FunLoraConfig(target_modules=TARGET),
        "identity": FunLoraConfig(target_modules=TARGET, function="identity"),
        "LoRA": LoraConfig(target_modules=TARGET, r=4),
    }


def measure() -> Findings:
    rows: list[Comparison] = []
    kept: dict[str, float] = {}
    for size in SIZES:
        for tokens in TOKENS:
            models = {
                name: get_peft_model(nn.Sequential(nn.Linear(size, size)), config)
                for name, config in configs().items()
            }
            x = torch.randn(tokens, size, requires_grad=True)
            name = f"{size:,} features, {tokens:,} tokens"
            seconds = take_turns(name, {side: step(model, x) for side, model in models.items()}, rounds=5)
            rows += [
                comparison(f"{side} / LoRA, {name}", {key: seconds[key] for key in (side, "LoRA")})
                for side in ("cosine", "identity")
            ]
            # All three keep the input and the base's weight.
            known = x.untyped_storage().nbytes() + 4 * size * size
            for side, model in models.items():
                kept[f"{side}, {name}"] = round((bytes_saved(partial(model, x)) - known) / 2**20, 1)
    return Findings(rows=rows, facts={"MiB kept for the backward pass besides input and weight": kept})


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    gradient = torch.randn_like(x)

    def run() -> None:
        model(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


if __name__ == "__main__":
    main(__doc__, measure, __file__)
