"""Find tensors that accelerate or diffusers' group offloading keep elsewhere, and keep them in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from .places import around


def group_hook(module: nn.Module) -> Any:
    """Return the hook by which diffusers offloads a module; None if it does not."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


def group_of(module: nn.Module) -> Any:
    """Return the group in which diffusers offloads a module, alone or with a module around it; None if it does not."""
    hooks = map(group_hook, (module, *around(module)))
    return next((hook.group for hook in hooks if hook is not None), None)


def is_offloaded(model: nn.Module, tensors: Collection[torch.Tensor]) -> bool:
    """Whether any of these tensors of a model cannot be read.

    accelerate leaves no tensor in the model; diffusers' groups on disk leave other values in it.
    """
    on_disk = [hook.group for hook in _group_hooks(model) if hook.group.offload_to_disk_path is not None]
    return any(tensor.is_meta or any(tensor in group.tensor_to_key for group in on_disk) for tensor in tensors)


def check_takes_parameters(model: nn.Module) -> None:
    """Raise a ValueError if a new parameter would break the offloading of a model.

    When diffusers offloads blocks with a stream, it only copies the parameters that a block had at the start.
    """
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
    """Take tensors out of a group on disk, and give them their values from there."""
    held = [tensor for tensor in tensors if tensor in group.tensor_to_key]
    if held:
        group.onload_()
        for tensor in held:
            del group.key_to_tensor[group.tensor_to_key.pop(tensor)]
        group.offload_()


def read_from(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor that is in a group on disk."""
    group.onload_()
    value = tensor.detach().clone()
    group.offload_()
    return value
