"""loralib's LoRA for convolutions, in two sizes, as a PEFT method.

PEFT's LoRA factorizes a convolution differently and has a different number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.utils import PeftType
from torch import nn

from ..tuner.functional import without_autocast
from ..tuner_base.layer import AdapterLayer, AdapterParameters
from ..utils.checks import check_at_least_one, check_choice
from .model import ConvAdapterConfig, ConvAdapterModel


BOTTLENECKS = ("kernel", "rank")


@dataclass
class ConvLoraConfig(ConvAdapterConfig):
    """The configuration of a [`ConvLoraModel`].

    Args:
        r (`int`): Rank.
        lora_alpha (`int`): The product of the factors is multiplied by `lora_alpha / r`.
        bottleneck (`str`): "kernel": factors `(r k, C_in k)` and `(C_out k, r k)` for a kernel of k x k, the paper's "LoRA
            Conv2d v1". "rank": `(r, C_in k)` and `(C_out k, r)`, its "v2".
        target_modules, exclude_modules, modules_to_save, trainable_token_indices: see [`ConvAdapterConfig`].

    Raises:
        ValueError: a number out of range or an unknown choice; it names the field.

    Source: arXiv 2510.02631, Table V [exact] for the counts of both; the scale is [ours]; loralib's ConvLoRA has the layout
    of "kernel".
    """

    r: int = 1
    lora_alpha: int = 1
    bottleneck: str = "kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CONV_LORA")
        check_at_least_one("r", self.r)
        check_at_least_one("lora_alpha", self.lora_alpha)
        check_choice("bottleneck", self.bottleneck, BOTTLENECKS)


class ConvLoraConv2d(AdapterLayer):
    """A Conv2d that adds a product of two factors to its weight: `W + (lora_alpha / r) reshape(B A)`."""

    conv_lora_A: AdapterParameters
    conv_lora_B: AdapterParameters
    adapter_layer_names = ("conv_lora_A", "conv_lora_B")

    def initial_parameters(self, config: ConvLoraConfig) -> dict[str, torch.Tensor]:
        """Return A `(width, C_in k)`, Kaiming-uniform, and B `(C_out k, width)`, zero: the layer starts unchanged."""
        rows, columns, kernel, other = self.weight_shape
        if kernel != other:
            raise ValueError(
                f"The convolution {self.get_base_layer()} has a kernel of {kernel} x {other}, expected a square one for "
                "this factorization: target other modules."
            )
        width = config.r * kernel if config.bottleneck == "kernel" else config.r
        A, B = torch.empty(width, columns * kernel), torch.zeros(rows * kernel, width)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(B, std=0.3)
        return {"conv_lora_A": A, "conv_lora_B": B}

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Add the terms of all adapters to the weight, in at least float32; return it in its dtype."""
        adapted = weight
        for name in adapter_names:
            config = self.settings[name]
            with without_autocast(weight.device.type):
                product = self.conv_lora_B(name) @ self.conv_lora_A(name)
            adapted = adapted + product.view(weight.shape) * (self.scaling[name] * config.lora_alpha / config.r)
        return adapted.to(weight.dtype)


class ConvLoraModel(ConvAdapterModel):
    """Puts loralib's LoRA on the convolutions of a model."""

    prefix: str = "conv_lora_"
    tuner_layer_cls = ConvLoraConv2d
