"""The models that the tuner's tests run on, three kinds of them, and what these tests compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from funlora_hf import FunLoraConfig
from funlora_hf.tuner import FunLoraLayer


UNET_CONFIG = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "num_class_embeds": 2,
}


class ConvMLP(nn.Module):
    """Convolutions and linear layers of plain torch, with a class embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(2, 6)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, (1, 3), stride=2, groups=2)])
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 4)
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        hidden = sample
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.gradient_checkpointing else block(hidden)
            hidden = torch.tanh(hidden)
        hidden = hidden.mean(dim=(2, 3)) + self.class_embedding(class_labels)
        return self.head(hidden + self.mlp(hidden))


def make_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**UNET_CONFIG, **changes}).eval()


def make_condition_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        num_class_embeds=2,
    ).eval()


def make_plain() -> ConvMLP:
    torch.manual_seed(0)
    return ConvMLP().eval()


def batch(size: int = 3, *, seed: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of a `UNet2DModel`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(size, 3, 8, 8, generator=generator),
        "timestep": 1000 * torch.rand(size, generator=generator),
        "class_labels": torch.arange(size) % 2,
    }


def condition_batch(size: int = 3, *, seed: int = 2) -> dict[str, torch.Tensor]:
    states = torch.randn(size, 4, 16, generator=torch.Generator().manual_seed(seed + 1))
    return {**batch(size, seed=seed), "encoder_hidden_states": states}


def plain_batch(size: int = 3, *, seed: int = 2) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch(size, seed=seed).items() if name != "timestep"}


@dataclass(frozen=True)
class Kind:
    """One kind of model: how to make it and its inputs, what to adapt, a module to save whole."""

    name: str
    base: Callable[[], nn.Module]
    batch: Callable[..., dict[str, torch.Tensor]]
    whole: str
    targets: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **config: Any) -> FunLoraConfig:
        """Of an adapter with random weights and a class vector, unless `config` says otherwise."""
        return FunLoraConfig(**{"init_weights": False, "class_embedding": "class_embedding", **self.targets, **config})

    def model(self, *adapters: str, base: nn.Module | None = None, seed: int = 1, **config: Any) -> PeftModel:
        """A PeftModel with an adapter for every name, "default" if there is none; the first is active."""
        base = self.base() if base is None else base
        torch.manual_seed(seed)
        first, *others = adapters or ("default",)
        model = get_peft_model(base, self.config(**config), adapter_name=first)
        for name in others:
            model.add_adapter(name, self.config(**config))
        return model.eval()

    def run(self, model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, **kwargs: Any) -> torch.Tensor:
        """The output, without gradients."""
        with torch.no_grad():
            return output(model(**(self.batch() if inputs is None else inputs), **kwargs))


KINDS = (
    Kind("UNet2DModel", make_unet, batch, whole="conv_out"),
    Kind(
        "UNet2DConditionModel",
        make_condition_unet,
        condition_batch,
        whole="conv_out",
        targets={"target_modules": ["conv1", "proj_in", "to_q", "ff.net.2"]},
    ),
    Kind(
        "modules",
        make_plain,
        plain_batch,
        whole="head",
        targets={"target_modules": ["blocks.0", "blocks.1", "mlp.0", "mlp.2"]},
    ),
)
UNET, CONDITION_UNET, PLAIN = KINDS
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def output(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.sample


def funlora_layers(model: nn.Module) -> list[FunLoraLayer]:
    return [module for module in model.modules() if isinstance(module, FunLoraLayer)]


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "funlora_" in name and name.endswith(f".{adapter}")}


def adapter_state(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """A copy of an adapter as PEFT saves it."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: value.clone() for name, value in state.items()}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "funlora_" not in name}


def assert_equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def differ(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs differ by more than rounding could explain."""
    return (actual - expected).abs().max().item() > 1e-3


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
