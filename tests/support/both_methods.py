"""What tests of a pipeline with LoRA and with FunLoRA share: how one saves and loads, and the tables of the page that they are rows of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from runs import REPOSITORY
from text_to_image import component, make_pipeline

from funlora_hf import FunLoraConfig, load_adapter, save_adapter


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Method:
    """How one saves and loads a pipeline's adapter."""

    name: str
    config: Callable[..., PeftConfig]
    save: Callable[[Any, Any], None]
    load: Callable[[Any, Any], None]

    def random(self, **config: Any) -> PeftConfig:
        """Of an adapter that is not the identity."""
        start = "init_weights" if self.name == "FunLoRA" else "init_lora_weights"
        return self.config(**{"target_modules": ATTENTION, start: False, **config})


def save_lora(pipe: Any, folder: Any) -> None:
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(component(pipe), adapter_name="mine")}
    type(pipe).save_lora_weights(folder, **layers)


LORA = Method("LoRA", LoraConfig, save_lora, lambda pipe, folder: pipe.load_lora_weights(folder, adapter_name="mine"))
FUNLORA = Method(
    "FunLoRA",
    FunLoraConfig,
    lambda pipe, folder: save_adapter(component(pipe), folder, "mine"),
    lambda pipe, folder: load_adapter(component(pipe), folder, adapter_name="mine"),
)
methods = pytest.mark.parametrize("method", [LORA, FUNLORA], ids=lambda method: method.name)
two_pipelines = pytest.mark.parametrize("name", ["SDXL", "SD3"])  # a U-Net and a transformer


class Rows(list[str]):
    """The rows of a table that tests cover; called, it marks a test as that of a row."""

    def __call__(self, capability: str) -> Callable:
        self.append(capability)
        return methods

    def check_table(self, heading: str) -> None:
        """The table under a heading of the page has these rows."""
        page = (REPOSITORY / "docs" / "guides" / "text_to_image.md").read_text(encoding="utf-8")
        section = page.partition(f"{heading}\n")[2].partition("\n#")[0]
        cells = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
        assert cells[0] == [" capability", "LoRA", "FunLoRA "]
        assert [row[0].strip() for row in cells[2:]] == self
        assert {len(row) for row in cells[2:]} == {3}


def adapted(name: str, config: PeftConfig, adapter_name: str = "mine") -> Any:
    pipe = make_pipeline(name)
    component(pipe).add_adapter(config, adapter_name)
    return pipe


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def far(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() > 1e-2
