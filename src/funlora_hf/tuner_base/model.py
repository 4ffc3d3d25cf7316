"""Base class of tuners with adapter layers: add the layers to a model, and merge all of them or none."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..utils.tensors import check_before_loading
from .layer import AdapterLayer, adapter_layers
from .mixed_batch import mixed_batch
from .offloading import check_takes_parameters
from .places import remember_place
from .wrappers import remove_adapters


class AdapterModel(BaseTuner):
    """A tuner that wraps modules in subclasses of [`AdapterLayer`]; its subclasses choose the layer classes."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads a class attribute of this name

    @abstractmethod
    def _layer_class(self, peft_config: Any, name: str, target: nn.Module) -> type[AdapterLayer]:
        """Return the layer class for the module `target`; raise a ValueError if it cannot be adapted."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # PEFT looks up the model type here, which a UNet does not have; `_prepare_model` gets the model itself.
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers into a model, as PEFT does. If this fails, no layer has the adapter afterwards."""
        is_new = all(adapter_name not in layer.settings for layer in adapter_layers(model))
        try:
            if "." in adapter_name or not adapter_name:
                raise ValueError(
                    f"`adapter_name` is {adapter_name!r}, expected a name without dots: torch accepts no other name."
                )
            check_takes_parameters(model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if is_new:
                remove_adapters(model, [adapter_name], keep_configs=True)
                self.peft_config.pop(adapter_name, None)
            raise
        _find_shared(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        check_no_other_method(current_key, target, self.tuner_layer_cls)
        new_module = self._layer_class(peft_config, current_key, target)(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # The layers create adapters in float32; without `autocast_adapter_dtype` they get the dtype of the base.
        for layer in adapter_layers(self):
            for tensor in layer.tensors_of(adapter_name):
                tensor.data = tensor.data.to(layer.weight.dtype)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method also moves adapters to the base's device, which is "meta" for an offloaded layer, and writes to `weight`,
        # which a parametrized layer computes.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does; if one layer refuses, nothing has changed."""
        for layer in adapter_layers(self):
            layer.check_deletes(adapter_name)
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, the active ones by default, as PEFT does; if one layer refuses, none stays merged."""
        layers = adapter_layers(self)
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer, names in zip(layers, before, strict=True):
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise a NotImplementedError, as PEFT's mixed model does: the adapters of these methods have no weighted sum."""
        raise NotImplementedError(
            f"Weighted adapters are not supported for {type(self).__name__}: activate several adapters by `set_adapter`, and "
            "weigh each by `set_block_weights`, or by `set_adapters(names, weights)` of a pipeline."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)  # all layers or none
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already merged|Already following adapters")
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # From a `PeftModel`, torch passes on only the keys that begin with the prefix; if there are none, PEFT only warns.
        if prefix and not state_dict:
            raise ValueError(
                f"No tensor to load has a name that begins with {prefix!r}, so the adapter would keep its initial values. "
                "Save it by `save_pretrained`, or rename its tensors to `base_model.model.<layer>.<parameter>`."
            )
        own = self.state_dict(prefix=prefix)
        live: dict[str, torch.Tensor] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, self.tuner_layer_cls):
                live |= layer.adapter_tensors(f"{prefix}{name}.")
        # The base may have a module whose name begins like the names of an adapter's tensors.
        others = [key for key in state_dict if key not in own and f".{self.prefix}" in f".{key}"]
        check_before_loading(
            live,
            {key: value for key, value in state_dict.items() if key in live or key in others},
            saved_modules={key: value for key, value in state_dict.items() if ".modules_to_save." in key},
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. For training, run forward and "
                "backward inside `with mixed_batch(model, adapter_names):`."
            )
        with mixed_batch(self, adapter_names):
            yield


def check_no_other_method(name: str, module: nn.Module, layer_cls: type) -> None:
    """Raise a ValueError if `module` has an adapter of a method other than that of `layer_cls`."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, layer_cls):
        raise ValueError(
            f"Target module {name} has an adapter of another method, whose effect would be lost. Merge or "
            "unload that adapter first (in a pipeline, fuse the LoRA first: `fuse_lora()`, then `unload_lora_weights()`), or "
            "target other modules."
        )


def _find_shared(model: nn.Module) -> None:
    """Tell adapter layers which other modules have their weight, and warn about layers that are in the model twice."""
    layers: dict[nn.Module, AdapterLayer] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer):
            layer.path, layer.shared_with = name, []
            layers[layer.get_base_layer()] = layer
            remember_place(layer.get_base_layer(), model, name)
    users: dict[nn.Parameter, dict[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        wrapped = child == "base_layer" and isinstance(model.get_submodule(parent), AdapterLayer)
        for parameter in module._parameters.values():
            users.setdefault(parameter, {}).setdefault(module, parent if wrapped else name)
        if module in layers and not wrapped:
            warnings.warn(
                f"{layers[module].path} and {name} are one shared module. The adapter acts only in the former; after a merge, "
                "in both.",
                stacklevel=2,
            )
    for base, layer in layers.items():
        weight = base._parameters.get("weight")
        if weight is not None:
            layer.shared_with = [name for user, name in users[weight].items() if user is not base]
