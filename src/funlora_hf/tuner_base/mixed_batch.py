"""Batches of several adapters: each sample runs through its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layer import BASE, AdapterGroups, adapter_layers
from .weights import cached_weights


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Run each sample of a batch through an adapter of its own, in training or evaluation.

    All forwards of this thread inside the context take `len(adapter_names)` samples. Gradients reach those parameters that
    require them: make the adapters of the batch trainable first, with `set_requires_grad(adapter_names)` or
    `set_adapter(adapter_names)`. With gradient checkpointing the backward belongs inside, too. Without gradients, effective
    weights are kept as in `cached_weights`: sampling belongs inside as a whole.

    Args:
        model: a PeftModel, a tuner or any module with adapter layers in it.
        adapter_names: the adapter of each sample, `"__base__"` for none. Sorted by adapter they run fastest. Around a
            pipeline of diffusers, use `mixed_prompts`.

    Raises:
        ValueError: an adapter that the model does not have, or a batch of another length.

    Source: [ours].
    """
    check_adapter_names(model, adapter_names)
    handles = give_names(model, adapter_names)
    try:
        with cached_weights(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def check_adapter_names(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise a ValueError for adapters that the model does not have."""
    known = {name for layer in adapter_layers(model) for name in layer.settings}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def give_names(model: nn.Module, adapter_names: Sequence[str]) -> list[RemovableHandle]:
    """Hooks by which each layer gets the adapter of each sample, in this thread, until they are removed."""
    give_groups = _giving(AdapterGroups(adapter_names))
    handles = [layer.register_forward_pre_hook(give_groups, with_kwargs=True) for layer in adapter_layers(model)]
    for wrapper in (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)):
        # PEFT's own wrapper around `modules_to_save` takes names; to an adapter without such it is the base's.
        own = wrapper._get_available_adapters()
        names = [name if name in own else BASE for name in adapter_names]
        handles.append(wrapper.register_forward_pre_hook(_giving(names), with_kwargs=True))
    return handles


def _giving(adapter_names: AdapterGroups | list[str]) -> Callable[..., Any]:
    """A hook that passes names to a layer, in the thread that makes it and in those of its backward."""
    thread = threading.get_ident()

    def give(
        module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        # torch calls a hook that another thread has removed in the meantime without keywords.
        if kwargs is None:
            return None
        if torch.compiler.is_compiling() or threading.get_ident() == thread:
            return args, {**kwargs, "adapter_names": adapter_names}
        # On GPUs, autograd runs backwards in threads of its own, and there repeats checkpointed forwards.
        is_backward = torch._C._current_graph_task_id() != -1
        return (args, {"adapter_names": adapter_names, **kwargs}) if is_backward else None

    return give
