"""What layers with adapters share, whatever an adapter does: which acts and how strongly, mixed batches, exact merging.

Knows PEFT's layer protocol; knows nothing of FunLoRA, of models, training or files.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .tensor_checks import check_before_loading
from .weight_cache import WeightCache


BASE = "__base__"


class AdapterGroups:
    """A mixed batch, sorted by adapter once for all layers of a forward. A batch that comes sorted is only cut.

    Args:
        names: adapter of every sample, `"__base__"` for none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            by_name.setdefault(name, []).append(index)
        self.sizes = {name: len(indices) for name, indices in by_name.items()}
        order = [index for indices in by_name.values() for index in indices]
        self._is_sorted = order == sorted(order)
        order = torch.tensor(order, dtype=torch.long)
        self._indices = {order.device: (order, torch.argsort(order))}

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """The samples of `x`, `(batch, ...)`, adapter by adapter."""
        return x if self._is_sorted else x[self._indices_on(x.device)[0]]

    def unsort(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`: `(batch, ...)` in the order of `names`."""
        return x if self._is_sorted else x[self._indices_on(x.device)[1]]

    def split(self, x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The samples of `x`, `(batch, ...)`, as one part for every adapter."""
        return list(zip(self.sizes, self.sort(x).split(list(self.sizes.values())), strict=True))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        return self.unsort(torch.cat(list(parts)))

    def _indices_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Order and its inverse, moved to a device by the first layer that asks."""
        if device not in self._indices:
            self._indices[device] = tuple(indices.to(device) for indices in next(iter(self._indices.values())))
        return self._indices[device]


def blend(identity: torch.Tensor | float | None, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`identity + scale * (value - identity)`; at scale 1 `value` itself, to the bit, and `identity` is not used."""
    return value if scale == 1 else identity + scale * (value - identity)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module wrapped so that adapters change what it computes.

    A subclass says how adapters change the base's weight and what the layer computes with them, each adapter at its
    `scaling`: 0 is the base, 1 the adapter as trained (see `blend`).
    """

    other_param_names = ("settings", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.settings: dict[str, PeftConfig] = {}
        self.scaling: dict[str, float] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Merging multiplies, so it cannot be undone by arithmetic: the weight itself is kept. Not part of state_dict.
        self.register_buffer("_weight_before_merge", None, persistent=False)
        self._weights = WeightCache()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add (or start anew) the parameters of an adapter, on the device of the base's weight."""
        self._weights.clear()
        self.settings[adapter_name] = config
        self.scaling[adapter_name] = 1.0
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        for name, value in self.initial_parameters(config).items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @abstractmethod
    def initial_parameters(self, config: PeftConfig) -> dict[str, torch.Tensor]:
        """The tensors of a new adapter, by the name of their dictionary."""

    @abstractmethod
    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """The base's `weight` as the adapters change it together, each at its `scaling`."""

    @abstractmethod
    def adapted_forward(
        self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output with these adapters acting on all of `x`, each at its `scaling`."""

    def effective_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """`adapted_weight` of the base's own weight, without gradients computed once until something changes.

        It must not be changed. A layer keeps one such weight, and during `mixed_batch` one for every adapter.
        """
        weight = self.get_base_layer().weight
        return self._weights.get(
            tuple((name, self.scaling[name]) for name in adapter_names),
            lambda: self.adapted_weight(adapter_names, weight),
            by_value=[tensor for name in adapter_names for tensor in self._tensors_of(name)],
            by_version=[weight],
        )

    def keep_weights(self, capacity: int) -> int:
        """Set how many effective weights to keep at a time; returns how many it was."""
        before, self._weights.capacity = self._weights.capacity, capacity
        return before

    def forget_weights(self) -> None:
        """Drop the effective weights that are kept; for changes that torch cannot see."""
        self._weights.clear()

    def train(self, mode: bool = True) -> AdapterLayer:
        """Set training or evaluation, as of any module."""
        self.forget_weights()
        return super().train(mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Set how strongly an adapter acts; a layer without it ignores the call. Not saved with the adapter.

        Args:
            adapter (`str`): name of the adapter.
            scale (`float`):
                0 is the base, 1 the adapter as trained; between them and beyond, the weight with this adapter alone is
                `base + scale * (adapted - base)`. Merged weights follow.

        Source: [ours]; the calls are those of PEFT's LoRA layers.
        """
        if adapter not in self.scaling:
            return
        merged = list(self.merged_adapters)
        if adapter in merged:
            self.unmerge()
        self.scaling[adapter] = scale
        if adapter in merged:
            self.merge(adapter_names=merged)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by `scale`."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by `scale`; None sets it back to 1."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Adapted minus original weight at the adapter's scale, in the weight's own shape."""
        weight = self._original_weight()
        return self.adapted_weight([adapter], weight) - weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapters into the base's weight.

        Args:
            safe_merge (`bool`, *optional*):
                Refuse, and change nothing, if the merged weight is not finite.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge; None means the active ones.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if not adapter_names:
            return
        original = self._original_weight()
        together = [*self.merged_adapters, *adapter_names]
        with torch.no_grad():
            merged = self.adapted_weight(together, original)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {','.join(adapter_names)} seems to be broken"
            )
        if self._weight_before_merge is None:
            self._weight_before_merge = original.clone()
        self.weight.data = merged
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Put the base's weight back as it was before the merge, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.data = self._weight_before_merge.to(device=self.weight.device, dtype=self.weight.dtype)
        self._weight_before_merge = None
        self.merged_adapters = []

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: AdapterGroups | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(adapter_names, x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_with(self.active_adapters, x, *args, **kwargs)

    def _forward_with(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        present = [name for name in adapter_names if name in self.settings]
        if not present:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(present, x, *args, **kwargs)

    def _mixed_forward(self, groups: AdapterGroups, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(groups.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(groups.names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(groups.sizes) == 1:
            return self._forward_with(list(groups.sizes), x, *args, **kwargs)
        return self._forward_groups(groups, x, *args, **kwargs)

    def _forward_groups(self, groups: AdapterGroups, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of a batch of two adapters at least."""
        return groups.join([self._forward_with([name], part, *args, **kwargs) for name, part in groups.split(x)])

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters of all adapters, by their key in the layer's `state_dict`."""
        return {
            f"{part}.{name}": parameter
            for part in self.adapter_layer_names
            for name, parameter in getattr(self, part).items()
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The tuner checks all its layers before any is loaded; this is for a model without one around it.
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        check_before_loading(
            {f"{prefix}{key}": parameter for key, parameter in self.adapter_tensors().items()},
            {k: value for k, value in own.items() if k[len(prefix) :].partition(".")[0] in self.adapter_layer_names},
            saved_modules={},
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _tensors_of(self, adapter_name: str) -> list[torch.Tensor]:
        dictionaries = (getattr(self, part) for part in self.adapter_layer_names)
        return [parameters[adapter_name] for parameters in dictionaries if adapter_name in parameters]

    def _original_weight(self) -> torch.Tensor:
        return self.weight.data if self._weight_before_merge is None else self._weight_before_merge

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's, this leaves the dtype alone: rounded to bfloat16, alpha would no longer start as the identity.
        device = self.weight.device if device is None else device
        if device.type == "meta":
            return
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device)


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """The adapter layers in a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def _refuse_other_method(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    wraps = name == "base_layer" and isinstance(module, BaseTunerLayer)
    if wraps and isinstance(submodule, AdapterLayer):
        raise ValueError(
            f"{type(module).__module__}.{type(module).__name__} cannot be put around a {type(submodule).__name__} of "
            f"{submodule.get_base_layer()}: both change the same weight, and merging one would corrupt the other. Merge "
            "and unload the adapters that are there, or target other modules."
        )


# Another method puts its layer around whatever it finds and asks nothing of what it wraps; this is where torch tells.
register_module_module_registration_hook(_refuse_other_method)
