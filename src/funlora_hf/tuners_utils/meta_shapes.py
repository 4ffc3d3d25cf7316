"""Names and shapes of what an adapter holds on a model, found without memory for it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from .wrappers import base_module, is_wrapper, plain_modules, without_peft


_HOOKS = ("forward", "_hf_hook", "_diffusers_hook", "_old_forward")


def adapted_shape(model: nn.Module, config: PeftConfig) -> nn.Module:
    """A copy of a model on the meta device, its adapters replaced by one of `config`.

    Neither the model nor the configuration is changed.

    Raises:
        ValueError: what PEFT raises for targets that the model does not have.
    """
    config = copy.deepcopy(config)
    # A configuration read from a file is one for inference, with nothing to train.
    config.inference_mode = False
    config.base_model_name_or_path = None
    model = without_peft(model)
    # deepcopy takes what the memo holds instead of copying it.
    memo: dict[int, Any] = {id(tensor): _without_values(tensor) for tensor in (*model.parameters(), *model.buffers())}
    # Hooks of accelerate and diffusers, which hold values, and what cannot be copied.
    for module in model.modules():
        memo |= {id(value): None for name, value in module.__dict__.items() if name in _HOOKS}
    shape = _plain(copy.deepcopy(model, memo)).requires_grad_(False)
    with torch.device("meta"):
        return get_peft_model(shape, config)


def adapter_tensor_shapes(
    model: nn.Module, config: PeftConfig, *, layers: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that an adapter of `config` saves, by the keys that PEFT saves them under, on the meta device.

    Args:
        model: the base, with adapters or without.
        config: of the adapter.
        layers: names of all modules that it changes, where they are known: then no others are searched, which is faster.

    Raises:
        ValueError: what PEFT raises for targets that the model does not have.
    """
    part = model if layers is None else _only(model, layers)
    return get_peft_model_state_dict(adapted_shape(part, config), save_embedding_layers=False)


def _only(model: nn.Module, layers: Collection[str]) -> nn.Module:
    """A model of only these modules, by their names; the modules themselves, not copies."""
    # A wrapped module comes after its wrapper.
    found = {name: module for name, module in plain_modules(model) if name in layers}
    root = nn.Module()
    for name in sorted(found):
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, found[name])
    return root


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _plain(model: nn.Module) -> nn.Module:
    """The model without adapters and hooks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_wrapper(child):
                setattr(parent, name, base_module(child))
    # By this attribute PEFT and diffusers see that a model has adapters.
    model.__dict__.pop("peft_config", None)
    for module in model.modules():
        # Hooks of accelerate and diffusers, which would bring values.
        for name in _HOOKS:
            module.__dict__.pop(name, None)
    return model
