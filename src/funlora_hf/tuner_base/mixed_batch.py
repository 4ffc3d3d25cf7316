"""Run each sample of a batch through a separate adapter."""

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
    """Run each sample of a batch through a separate adapter, in training or evaluation.

    All forwards of this thread inside the context take `len(adapter_names)` samples. Gradients reach the parameters that
    require them: make the adapters of the batch trainable first, with `set_requires_grad(adapter_names)` or
    `set_adapter(adapter_names)`. With gradient checkpointing, also run the backward inside. Without gradients, effective
    weights are kept as in `cached_weights`: run the whole sampling loop inside.

    Args:
        model: a PeftModel, a tuner or any module with adapter layers in it.
        adapter_names: the adapter of each sample; `"__base__"`: no adapter. Batches sorted by adapter run fastest. For a
            pipeline of diffusers, use `mixed_prompts`.

    Raises:
        ValueError: an adapter that the model does not have, or a batch whose length differs from that of `adapter_names`.

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
    """Add hooks that pass the adapter of each sample to each layer, in this thread, and return their handles."""
    give_groups = _giving(AdapterGroups(adapter_names))
    handles = [layer.register_forward_pre_hook(give_groups, with_kwargs=True) for layer in adapter_layers(model)]
    for wrapper in (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)):
        # PEFT's wrapper around `modules_to_save` also takes names; for an adapter without such modules, the base's module runs.
        own = wrapper._get_available_adapters()
        names = [name if name in own else BASE for name in adapter_names]
        handles.append(wrapper.register_forward_pre_hook(_giving(names), with_kwargs=True))
    return handles


def _giving(adapter_names: AdapterGroups | list[str]) -> Callable[..., Any]:
    """Return a hook that passes names to a layer, in the thread that creates it and in the threads of its backward."""
    thread = threading.get_ident()

    def give(
        module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        # If another thread has removed a hook in the meantime, torch calls it without keywords.
        if kwargs is None:
            return None
        if torch.compiler.is_compiling() or threading.get_ident() == thread:
            return args, {**kwargs, "adapter_names": adapter_names}
        # On GPUs, autograd runs the backward pass in other threads, and repeats checkpointed forwards there.
        is_backward = torch._C._current_graph_task_id() != -1
        return (args, {"adapter_names": adapter_names, **kwargs}) if is_backward else None

    return give
