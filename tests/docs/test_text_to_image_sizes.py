"""Targets, numbers and memory in docs/guides/text_to_image.md, counted on the real models without their weights."""

from __future__ import annotations

import math

import pytest
from real_models import real_model
from runs import REPOSITORY

from funlora_hf import FunLoraConfig
from funlora_hf.tuner_base.layer import adapter_layers
from funlora_hf.tuner_base.meta_shapes import adapted_shape


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "joint attention": [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "all-linear": "all-linear",
    "None": None,
}


def table(header: str) -> list[list[str]]:
    """Rows of the page's table whose first line begins so."""
    lines = (REPOSITORY / "docs" / "guides" / "text_to_image.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    end = next(i for i in range(start, len(lines) + 1) if i == len(lines) or not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:end]]


def shown(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} K"


@pytest.mark.parametrize("row", table("| model |"), ids=lambda row: "-".join(row[:2]))
def test_sizes(row):
    name, targets, layers, numbers, shared, lora, copy = row
    model = adapted_shape(real_model(name), FunLoraConfig(target_modules=TARGETS[targets.strip("`")]))
    shapes = [layer.weight.shape for layer in adapter_layers(model)]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def counted(ratio):
        return sum(math.ceil(shape[0] / ratio) + math.ceil(shape[1] / ratio) + 20 for shape in shapes)

    assert counted(1) == trained
    assert (layers, numbers, shared) == (str(len(shapes)), shown(trained), shown(counted(8)))
    assert lora == shown(sum(16 * (shape[0] + shape[1:].numel()) for shape in shapes))
    assert copy == f"{2 * sum(shape.numel() for shape in shapes) / 2**30:.1f} GiB"
