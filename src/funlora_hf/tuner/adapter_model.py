"""What tuners of adapter layers share: putting the layers in, merging all or none, batches of several classes.

Knows PEFT's tuner protocol; knows nothing of FunLoRA, of training or files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapter_layer import BASE, AdapterGroups, AdapterLayer, adapter_layers
from .save_guard import guard_saving, release_saving
from .tensor_checks import check_before_loading


# Of the effective weights of a mixed batch; for the paper's U-Net and layers, 32 of them take 1.1 GB in float32.
MOST_WEIGHTS_KEPT = 32


class AdapterModel(BaseTuner):
    """A tuner that wraps modules by subclasses of [`AdapterLayer`]; subclasses say which."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads a class attribute of this name

    @abstractmethod
    def _layer_class(self, peft_config: PeftConfig, name: str, target: nn.Module) -> type[AdapterLayer]:
        """What to wrap the module `target` by; raises a ValueError for a module that cannot be adapted."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # PEFT looks the model type up here, which a UNet has not; `_prepare_model` sees the model itself.
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers into a model, as PEFT does; until they are off again, diffusers does not save the model."""
        guard_saving(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        release_saving(model)
        return model

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
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
        # The layers keep adapters in float32; who switches that off, as PEFT allows, gets the dtype of the base.
        for layer in adapter_layers(self):
            for parameters in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter_name in parameters:
                    parameters[adapter_name].data = parameters[adapter_name].data.to(layer.weight.dtype)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # On unloading. PEFT would copy the wrapper's `weight`, which for trained tokens is no parameter.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merge the active adapters into the base's weights; if one layer refuses, none stays merged.

        Args:
            adapter_names (`list[str]`, *optional*): the adapters to merge; None means the active ones.
            safe_merge (`bool`, *optional*): refuse weights that are not finite.
        """
        layers = adapter_layers(self)
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
        except ValueError:
            for layer, names in zip(layers, before, strict=True):
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict(prefix=prefix)
        live = {
            f"{prefix}{name}.{key}": parameter
            for name, layer in self.named_modules()
            if isinstance(layer, self.tuner_layer_cls)
            for key, parameter in layer.adapter_tensors().items()
        }

        def of_an_adapter(key: str) -> bool:
            # The base may have a module whose name begins as those of an adapter's tensors do.
            return key in live or (key not in own and any(part.startswith(self.prefix) for part in key.split(".")))

        check_before_loading(
            live,
            {key: value for key, value in state_dict.items() if of_an_adapter(key)},
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


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Run every sample of a batch through an adapter of its own, in training or evaluation.

    All forwards inside the context take `len(adapter_names)` samples. Gradients reach those parameters that require
    them: make the adapters of the batch trainable first, with `set_requires_grad(adapter_names)` or
    `set_adapter(adapter_names)`. With gradient checkpointing the backward belongs inside, too. Without gradients, the
    effective weights of up to 32 adapters are kept until the end of the context: sampling belongs inside as a whole.

    Args:
        model: a PeftModel, a tuner or any module with adapter layers in it.
        adapter_names: the adapter of every sample, `"__base__"` for none.

    Raises:
        ValueError: an adapter that the model does not have, or a batch of another length.

    Source: [ours].
    """
    layers = adapter_layers(model)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    known = {name for layer in layers for name in layer.settings}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    groups = AdapterGroups(adapter_names)
    capacities = [layer.keep_weights(min(len(groups.sizes), MOST_WEIGHTS_KEPT)) for layer in layers]
    handles = [
        layer.register_forward_pre_hook(partial(_pass_adapter_groups, groups=groups), with_kwargs=True)
        for layer in layers
    ]
    handles += [
        wrapper.register_forward_pre_hook(
            partial(_pass_adapter_groups, groups=_names_for(wrapper, adapter_names)), with_kwargs=True
        )
        for wrapper in wrappers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, capacity in zip(layers, capacities, strict=True):
            layer.keep_weights(capacity)


@contextmanager
def adapters_enabled(model: nn.Module) -> Iterator[None]:
    """Adapter layers of a model that are disabled are enabled inside the context, and disabled again behind it.

    Args:
        model: any module with adapter layers in it.

    Source: [ours].
    """
    disabled = [layer for layer in adapter_layers(model) if layer.disable_adapters]
    for layer in disabled:
        layer.enable_adapters(True)
    try:
        yield
    finally:
        for layer in disabled:
            layer.enable_adapters(False)


def _names_for(wrapper: AuxiliaryTrainingWrapper, adapter_names: Sequence[str]) -> list[str]:
    """The names as PEFT's own wrapper around `modules_to_save` takes them; to an adapter without such it is the base's."""
    return [name if name in wrapper._get_available_adapters() else BASE for name in adapter_names]


def _pass_adapter_groups(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], groups: AdapterGroups | list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": groups}


def check_no_other_method(name: str, module: nn.Module, layer_cls: type[AdapterLayer]) -> None:
    """Raise a ValueError if `module` carries an adapter of another method than that of `layer_cls`."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, layer_cls):
        raise ValueError(
            f"Target module {name} carries an adapter of another method, whose effect would be dropped. Merge or "
            "unload that adapter first, or target other modules."
        )
