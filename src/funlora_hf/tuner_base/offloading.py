"""Tensors that diffusers' group offloading and accelerate keep elsewhere: which they are, and how to keep them here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn


# The model that a module with adapters is in, and its name there: diffusers may offload it with what is around it. No attribute, since
# neither a copy nor a pickle needs it.
_places: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], str]] = WeakKeyDictionary()


def remember_place(module: nn.Module, model: nn.Module, path: str) -> None:
    """Let `group_of` find what is around a module."""
    _places[module] = ref(model), path


def group_hook(module: nn.Module | None) -> Any:
    """The hook by which diffusers offloads a module; None if it does not."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


def group_of(module: nn.Module) -> Any:
    """The group in which diffusers offloads a module, by itself or with what is around it; None if it does not."""
    model, path = _places.get(module, (lambda: None, ""))
    around = [model()]
    for name in path.split("."):
        around.append(getattr(around[-1], name, None))  # None if the model has changed since
    hooks = (group_hook(each) for each in (module, *reversed(around)))
    return next((hook.group for hook in hooks if hook is not None), None)


def is_offloaded(model: nn.Module, tensors: Collection[torch.Tensor]) -> bool:
    """Whether any of these tensors of a model are where they cannot be read: accelerate leaves none in the model, diffusers' groups on
    disk other values."""
    on_disk = [hook.group for hook in _group_hooks(model) if hook.group.offload_to_disk_path is not None]
    return any(tensor.is_meta or any(tensor in group.tensor_to_key for group in on_disk) for tensor in tensors)


def check_takes_parameters(model: nn.Module) -> None:
    """Raise a ValueError if a new parameter would break the offloading of a model: diffusers copies those that a block had only."""
    if any(
        hook.config.offload_type == "block_level" and hook.config.stream is not None for hook in _group_hooks(model)
    ):
        raise ValueError(
            "The model is offloaded in blocks with a stream, which take no new parameters: add the adapter before you offload the model, "
            'or offload with `offload_type="leaf_level"`.'
        )


def _group_hooks(model: nn.Module) -> Iterator[Any]:
    return (hook for module in model.modules() if (hook := group_hook(module)) is not None)


def keep_in_memory(group: Any, tensors: Collection[torch.Tensor]) -> None:
    """Take tensors out of a group on disk, with the values that they have there."""
    held = [tensor for tensor in tensors if tensor in group.tensor_to_key]
    if held:
        group.onload_()
        for tensor in held:
            del group.key_to_tensor[group.tensor_to_key.pop(tensor)]
        group.offload_()


def read_from(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that is in a group on disk."""
    group.onload_()
    value = tensor.detach().clone()
    group.offload_()
    return value
