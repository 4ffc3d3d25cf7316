"""Keep effective weights inside a context, so that sampling computes each of them once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# The weights that are kept now, by layer. A context variable, one for each thread: the only global state of this package.
_kept: ContextVar[Mapping[nn.Module, dict[Hashable, tuple[Sequence[torch.Tensor], torch.Tensor]]]] = ContextVar(
    "funlora_cached_weights"
)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Compute the effective weight of each adapter in a model once, and keep it until the context ends.

    Use it for sampling and evaluation, where a model runs many times and its adapters do not change. Inside, change adapters
    only by `hotswap_adapter`, `set_scale`, `merge_adapter`, `add_adapter`, `delete_adapter` or an [`AdapterBank`]; other
    writes to their parameters, their config or the base's weights take effect after the context. Weights are kept only for
    this thread. A layer keeps no weight if gradients of it are needed, while torch compiles, or if a hook or parametrization
    computes or moves the base's weight (offloading, FSDP).

    Contexts nest: an inner context uses the weights of an outer one, and adds its weights to them.

    Args:
        model (`torch.nn.Module`): a model with adapter layers in it; without any, nothing happens.

    Source: [ours].
    """
    outer = _kept.get({})
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    token = _kept.set({**{layer: {} for layer in layers}, **outer})
    try:
        yield
    finally:
        _kept.reset(token)


def cached(
    layer: nn.Module, key: Hashable, sources: Sequence[torch.Tensor], compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Return `compute()`, or its earlier result for this key and exactly these tensors inside a `cached_weights`."""
    if torch.compiler.is_compiling():
        return compute()
    weights = _kept.get({}).get(layer)
    if weights is None:
        return compute()
    # A tensor made in inference mode cannot be used in autograd later.
    key = (key, torch.is_inference_mode_enabled())
    # `torch.func.functional_call` replaces a module's parameters by other tensors.
    if key not in weights or any(one is not other for one, other in zip(weights[key][0], sources, strict=True)):
        weights[key] = sources, compute()
    return weights[key][1]


def forget(layer: nn.Module) -> None:
    """Drop the weights that are kept for a layer, because one of its adapters changes."""
    _kept.get({}).get(layer, {}).clear()
