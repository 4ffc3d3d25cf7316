"""FunLoraModel: puts FunLoRA layers into a model, and runs batches of several classes.

Knows PEFT's tuner protocol; knows nothing of training or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers import UNet2DModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .config import FunLoraConfig
from .layer import BASE, AdapterGroups, FunLoraClassVector, FunLoraConv2d, FunLoraLayer, FunLoraLinear
from .targets import ALL_CONV, conv_names, decoder_middle


class FunLoraModel(BaseTuner):
    """
    Creates a FunLoRA model from a model with convolutions or linear layers, such as a diffusers `UNet2DModel`.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`FunLoraConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The FunLoRA model.

    Example:

        ```py
        >>> from diffusers import UNet2DModel
        >>> from peft import get_peft_model
        >>> from funlora_hf import FunLoraConfig

        >>> unet = UNet2DModel(sample_size=32, num_class_embeds=2)
        >>> model = get_peft_model(unet, FunLoraConfig(class_embedding="class_embedding"))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "funlora_"
    tuner_layer_cls = FunLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads a class attribute of this name

    def _prepare_adapter_config(self, peft_config: FunLoraConfig, model_config: dict) -> FunLoraConfig:
        # PEFT looks the model type up here, which a UNet has not; `_prepare_model` sees the model itself.
        return peft_config

    def _prepare_model(self, peft_config: FunLoraConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            if not isinstance(model, UNet2DModel):
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: None is the middle of the decoder of a "
                    f"UNet2DModel, and the model is a {type(model).__name__}."
                )
            peft_config.target_modules = set(decoder_middle(model))
        elif peft_config.target_modules == ALL_CONV:
            peft_config.target_modules = set(conv_names(model))
        if peft_config.class_embedding is not None:
            _check_class_embedding(peft_config, model)
            _check_targets(peft_config, model)

    @staticmethod
    def _check_target_module_exists(peft_config: FunLoraConfig, key: str) -> Any:
        return _is_class_embedding(peft_config, key) or check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: FunLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        if isinstance(target, FunLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer_cls = (
            FunLoraClassVector if _is_class_embedding(peft_config, current_key) else _layer_class(current_key, target)
        )
        new_module = layer_cls(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merge the active adapters into the base's weights; if one layer refuses, none stays merged.

        Args:
            adapter_names (`list[str]`, *optional*): the adapters to merge; None means the active ones.
            safe_merge (`bool`, *optional*): refuse weights that are not finite.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, FunLoraLayer)]
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
    `set_adapter(adapter_names)`. With gradient checkpointing the backward belongs inside, too.

    Args:
        model: a PeftModel, a FunLoraModel or any module with FunLoRA layers in it.
        adapter_names: the adapter of every sample, `"__base__"` for none.

    Raises:
        ValueError: an adapter that the model does not have, or a batch of another length.

    Source: [ours].
    """
    layers = [module for module in model.modules() if isinstance(module, FunLoraLayer)]
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    known = {name for layer in layers for name in layer.settings}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    groups = AdapterGroups(adapter_names)
    handles = [
        layer.register_forward_pre_hook(partial(_pass_adapter_groups, groups=groups), with_kwargs=True)
        for layer in layers
    ]
    handles += [
        # PEFT's own wrapper around `modules_to_save` takes the names as a list.
        wrapper.register_forward_pre_hook(partial(_pass_adapter_groups, groups=list(adapter_names)), with_kwargs=True)
        for wrapper in wrappers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_adapter_groups(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], groups: AdapterGroups | list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": groups}


def _is_class_embedding(config: FunLoraConfig, key: str) -> bool:
    name = config.class_embedding
    return name is not None and (key == name or key.endswith(f".{name}"))


def _check_class_embedding(config: FunLoraConfig, model: nn.Module) -> None:
    matches = {key: module for key, module in model.named_modules() if _is_class_embedding(config, key)}
    if not matches:
        raise ValueError(
            f"`class_embedding` is {config.class_embedding!r}, but {type(model).__name__} has no such module. Name its "
            "class embedding (a UNet2DModel has one if it is built with `num_class_embeds`), or leave it None."
        )
    for key, module in matches.items():
        _check_no_other_method(key, module)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, nn.Embedding):
            raise ValueError(
                f"`class_embedding` is {config.class_embedding!r}, but {key} is a {type(base).__name__}, expected an "
                "nn.Embedding. Name another module, or leave it None."
            )


def _check_targets(config: FunLoraConfig, model: nn.Module) -> None:
    # PEFT raises if nothing matches, but here the class embedding always does.
    keys = [key for key, _ in model.named_modules()]
    if config.target_modules and not any(check_target_module_exists(config, key) for key in keys):
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model. Please check the target modules and "
            "try again."
        )


def _check_no_other_method(name: str, module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, FunLoraLayer):
        raise ValueError(
            f"Target module {name} carries an adapter of another method, whose effect FunLoRA would drop. Merge or "
            "unload that adapter first, or target other modules."
        )


def _layer_class(name: str, target: nn.Module) -> type[FunLoraLayer]:
    _check_no_other_method(name, target)
    for module_cls, layer_cls in ((nn.Conv2d, FunLoraConv2d), (nn.Linear, FunLoraLinear)):
        # A subclass with a forward of its own (a quantized layer, say) computes something else, and the output
        # projection of torch's MultiheadAttention is never called.
        plain = isinstance(target, module_cls) and type(target).forward is module_cls.forward
        if plain and not isinstance(target, NonDynamicallyQuantizableLinear):
            return layer_cls
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are supported: "
        "`torch.nn.Conv2d`, `torch.nn.Linear`."
    )
