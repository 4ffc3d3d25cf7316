"""A scale and a shift for every input channel of a convolution (SSF), as a PEFT method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import PeftType

from ..tuner_base.layer import AdapterLayer, BaseCall, blend
from .model import ConvAdapterConfig, ConvAdapterModel


@dataclass
class ScaleShiftConfig(ConvAdapterConfig):
    """The configuration of a [`ScaleShiftModel`]; see [`ConvAdapterConfig`] for its arguments.

    Source: arXiv 2510.02631, Table V [exact]: 2 C_in numbers per convolution.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SCALE_SHIFT")


class ScaleShiftConv2d(AdapterLayer):
    """A Conv2d with the input `scale * x + shift`, one scale and one shift for every input channel.

    Several active adapters are applied one after another [ours].
    """

    adapter_layer_names = ("scale_shift_scale", "scale_shift_shift")

    def initial_parameters(self, config: ScaleShiftConfig) -> dict[str, torch.Tensor]:
        """Return scale, ones, and shift, zeros, each `(C_in,)`."""
        channels: Any = self.get_base_layer().in_channels
        scale, shift = torch.ones(channels), torch.zeros(channels)
        if not config.init_weights:
            scale, shift = (value + 0.3 * torch.randn(channels) for value in (scale, shift))
        return {"scale_shift_scale": scale, "scale_shift_shift": shift}

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Raise a ValueError: no change of weight and bias equals a shift before a padded convolution."""
        raise ValueError(
            f"Adapters of scale and shift ({', '.join(adapter_names)}) cannot be merged: with zero padding, no change of the "
            "weight equals a shift of the input. Keep the adapter, or unload it."
        )

    def adapted_call(self, adapter_names: Sequence[str], call: BaseCall) -> torch.Tensor:
        """Convolve `scale * x + shift`, x `(batch, C_in, height, width)`."""
        adapted = call.x
        for name in adapter_names:
            scale, shift = (getattr(self, part)(name)[:, None, None] for part in self.adapter_layer_names)
            strength = self.scaling[name]
            adapted = adapted * blend(1.0, scale, strength) + blend(0.0, shift, strength)
        return call.run(adapted.to(call.x.dtype), call.weight)


class ScaleShiftModel(ConvAdapterModel):
    """Puts a scale and a shift before the convolutions of a model. Its adapters cannot be merged."""

    prefix: str = "scale_shift_"
    tuner_layer_cls = ScaleShiftConv2d
