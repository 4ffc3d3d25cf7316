"""Keep effective weights inside a context, so that sampling computes each of them once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# The weights kept now, by layer. A context variable, since each thread needs its own: the only state of this package.
_kept: ContextVar[Mapping[nn.Module, dict[Hashable, tuple[Sequence[torch.Tensor], torch.Tensor]]]] = ContextVar(
    "funlora_cached_weights"
)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """
    Compute the effective weight of each adapter in a model once, and keep it until the context ends.

    For sampling and evaluation, where a model runs many times and its adapters stay as they are. Inside, change adapters
    only by `hotswap_adapter`, `set_scale`, `merge_adapter`, `add_adapter`, `delete_adapter` or an [`AdapterBank`]; other
    writes to their parameters, their config or the base's weights take effect after the context. Weights are kept for this
    thread. None are kept where gradients of them are wanted, while torch compiles, or where the base's weight is computed
    or moved by a hook (parametrizations, offloading, FSDP).

    Contexts nest: an inner one uses what an outer one keeps, and leaves there what it adds.

    Args:
        model (`torch.nn.Module`): with adapter layers in it; without any, nothing happens.

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
    """`compute()`, or what it returned before for this key and these very tensors inside a `cached_weights`."""
    if torch.compiler.is_compiling():
        return compute()
    weights = _kept.get({}).get(layer)
    if weights is None:
        return compute()
    # A tensor made in inference mode cannot be used in autograd later.
    key = (key, torch.is_inference_mode_enabled())
    # `torch.func.functional_call` puts others in place of a module's parameters.
    if key not in weights or any(one is not other for one, other in zip(weights[key][0], sources, strict=True)):
        weights[key] = sources, compute()
    return weights[key][1]


def forget(layer: nn.Module) -> None:
    """Drop the weights that are kept of a layer, since one of its adapters changes."""
    _kept.get({}).get(layer, {}).clear()
