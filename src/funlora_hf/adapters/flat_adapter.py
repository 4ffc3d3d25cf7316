"""FlatAdapter: an adapter in a model whose tensors are views of one row, so that one copy replaces them."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import increment_version

from ..tuner.hotswap import saved_tensors
from ..tuners_utils.layer import adapter_layers
from ..tuners_utils.weights import forget


class FlatAdapter:
    """
    An adapter in a model as one row of numbers.

    Args:
        model (`torch.nn.Module`): holds the adapter.
        name (`str`): of the adapter.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self._model = name, model
        self._layers = [layer for layer in adapter_layers(model) if name in layer.settings]
        self.tensors: dict[str, torch.Tensor] = dict(saved_tensors(model, name))
        self._row = self._tie()

    @property
    def numel(self) -> int:
        """How many numbers the row has."""
        return self._row.numel()

    def flatten(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tensors by the keys of `tensors` as a new row `(numel,)` with the device and dtype of this adapter."""
        return torch.cat([tensors[key].detach().reshape(-1).to(self._row) for key in self.tensors])

    def cast(self, row: torch.Tensor) -> torch.Tensor:
        """A row as it would be in this adapter: in its dtype, on its device."""
        return row.to(self._row)

    def unflatten(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a row `(numel,)`, as views of it."""
        sizes = [tensor.numel() for tensor in self.tensors.values()]
        parts = zip(self.tensors.items(), row.split(sizes), strict=True)
        return {key: part.view(tensor.shape) for (key, tensor), part in parts}

    def copy_(self, row: torch.Tensor) -> None:
        """Give the adapter the values of a row `(numel,)`."""
        for layer in self._layers:
            layer.stop_offloading_adapters()
        if self._are_others():
            self.tensors = dict(saved_tensors(self._model, self.name))
        if not self._is_tied():
            self._row = self._tie()
        with torch.no_grad():
            self._row.copy_(row)
        # The parameters are views of the row, which autograd takes for tensors of their own.
        for tensor in self.tensors.values():
            increment_version(tensor)
        for layer in self._layers:
            forget(layer)

    def clear(self) -> None:
        """Leave nothing of the last row in the model."""
        self.copy_(torch.zeros(self.numel))

    def _tie(self) -> torch.Tensor:
        """Make all tensors views of a new row with their values, in float32 at least, whatever dtype the model is cast to."""
        # Views of a row made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            row = torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors.values()])
            row = row.to(torch.promote_types(row.dtype, torch.float32))
        for tensor, part in zip(self.tensors.values(), self.unflatten(row).values(), strict=True):
            tensor.data = part
        return row

    def _are_others(self) -> bool:
        """Whether the layers now have other parameters than `tensors`, as after offloading."""
        held = {id(tensor) for tensor in self.tensors.values()}
        return any(
            id(parameter) not in held
            for layer in self._layers
            for key, parameter in layer.adapter_tensors().items()
            if key.rpartition(".")[2] == self.name
        )

    def _is_tied(self) -> bool:
        """Whether the tensors are still views of the row: `model.to()` gives them storage of their own."""
        address, step = self._row.data_ptr(), self._row.element_size()
        for tensor in self.tensors.values():
            if tensor.data_ptr() != address or tensor.dtype != self._row.dtype:
                return False
            address += tensor.numel() * step
        return True
