"""Copy a model with an adapter to the meta device, without memory for values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from .wrappers import base_module, is_wrapper, without_peft


_HOOKS = ("forward", "_hf_hook", "_diffusers_hook", "_old_forward")


def adapted_shape(model: nn.Module, config: PeftConfig) -> nn.Module:
    """Copy a model to the meta device, with an adapter of `config` in place of its adapters.

    The model and the configuration do not change.

    Raises:
        ValueError: PEFT raises it for targets that the model does not have.
    """
    config = copy.deepcopy(config)
    # A configuration that was read from a file is for inference, with nothing to train.
    config.inference_mode = False
    config.base_model_name_or_path = None
    model = without_peft(model)
    # deepcopy uses the objects in the memo instead of copying the originals.
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    # Hooks of accelerate and diffusers contain values, and objects that cannot be copied.
    for module in model.modules():
        memo |= {id(value): None for name, value in module.__dict__.items() if name in _HOOKS}
    shape = _plain(copy.deepcopy(model, memo)).requires_grad_(False)
    with torch.device("meta"):
        return get_peft_model(shape, config)


def _plain(model: nn.Module) -> nn.Module:
    """Remove adapters and hooks from a model, and return it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_wrapper(child):
                setattr(parent, name, base_module(child))
    # PEFT and diffusers recognize a model with adapters by this attribute.
    model.__dict__.pop("peft_config", None)
    for module in model.modules():
        # Hooks of accelerate and diffusers, which would load values.
        for name in _HOOKS:
            module.__dict__.pop(name, None)
    return model
