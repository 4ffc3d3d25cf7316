"""Set how strongly adapters act in each part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .wrappers import without_peft


def set_block_weights(model: nn.Module, weights: Mapping[str, float], adapter_name: str | None = None) -> None:
    """Set how strongly adapters act in each part of a model: 0 is the base, 1 the adapter as trained.

    The dictionary that `set_adapters` of diffusers takes only reaches blocks with attention, and leaves the others at 1.

    Args:
        model (`torch.nn.Module`): a model with adapters of FunLoRA or LoRA, such as `pipe.unet` or a PeftModel.
        weights (`Mapping[str, float]`): Name of a module -> weight, such as `{"down_blocks.0": 0.5, "mid_block": 0.0,
            "up_blocks.1.resnets": 0.2}`. If a layer is in several of these modules, the longest name counts; layers in none
            of them get 1.
        adapter_name (`str`, *optional*): name of one adapter; None: all active adapters.

    Raises:
        ValueError: a module in which no layer has the adapter. Nothing has changed then.

    Source: [ours].
    """
    found: list[tuple[str, Any, list[str]]] = []
    for path, layer in without_peft(model).named_modules():
        if isinstance(layer, BaseTunerLayer):
            names = layer.active_adapters if adapter_name is None else [adapter_name]
            found.append((path, layer, [name for name in names if name in getattr(layer, "scaling", ())]))
    holders = {path: [key for key in weights if f"{path}.".startswith(f"{key}.")] for path, _, names in found if names}
    unknown = sorted(set(weights).difference(*holders.values()))
    if unknown:
        which = "an active adapter" if adapter_name is None else f"the adapter {adapter_name!r}"
        raise ValueError(
            f"`weights` names {', '.join(unknown)}, where no layer has {which}, expected modules that contain some of: "
            f"{', '.join(list(holders)[:5]) or 'none'}."
        )
    for path, layer, names in found:
        for name in names:
            layer.set_scale(name, weights[max(holders[path], key=len)] if holders[path] else 1.0)
