"""FlatAdapter: an adapter in a model as one row of numbers."""

from __future__ import annotations

import torch
from torch import nn

from ..tuner.hotswap import plain_key
from ..tuner_base.layer import AdapterLayer, adapter_layers
from ..tuner_base.weights import forget


class FlatAdapter:
    """
    An adapter in a model as one row of numbers.

    Args:
        model (`torch.nn.Module`): holds the adapter.
        name (`str`): of the adapter.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self._layers = [layer for layer in adapter_layers(model) if name in layer.settings]
        self._parts = {
            plain_key(f"{path}.{part}"): getattr(layer, part)
            for path, layer in model.named_modules()
            if isinstance(layer, AdapterLayer)
            for part in layer.adapter_layer_names
            if name in getattr(layer, part)
        }
        self._shapes = [tensor.shape for tensor in self.tensors.values()]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters that the layers have now, by the keys that PEFT saves them under, less its prefix."""
        return {key: part[self.name] for key, part in self._parts.items()}

    def flatten(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tensors by the keys of `tensors` as a new row `(numel,)` with the device and dtype of this adapter."""
        return self.cast(torch.cat([tensors[key].detach().reshape(-1) for key in self._parts]))

    def cast(self, row: torch.Tensor) -> torch.Tensor:
        """A row as it would be in this adapter: on its device, in its dtype, which is float32 at least."""
        own = next(iter(self._parts.values()))[self.name]
        return row.to(own.device, torch.promote_types(own.dtype, torch.float32))

    def unflatten(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a row `(numel,)`, as views of it."""
        parts = row.split([shape.numel() for shape in self._shapes])
        return {key: part.view(shape) for key, part, shape in zip(self._parts, parts, self._shapes, strict=True)}

    # Values given in inference mode could not be changed outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def copy_(self, row: torch.Tensor) -> None:
        """Give the adapter the values of a row `(numel,)`."""
        for layer in self._layers:
            layer.stop_offloading_adapters()
            forget(layer)
        tensors = list(self.tensors.values())
        for tensor in tensors:
            if tensor.dtype.itemsize < torch.float32.itemsize:  # the model was cast
                tensor.data = tensor.data.float()
        torch._foreach_copy_(tensors, list(self.unflatten(self.cast(row)).values()))

    def clear(self) -> None:
        """Leave nothing of the last row in the model."""
        self.copy_(torch.zeros(sum(shape.numel() for shape in self._shapes)))
