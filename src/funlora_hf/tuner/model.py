"""FunLoraModel: puts FunLoRA layers into a model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..tuner_base.model import AdapterModel, check_no_other_method
from ..tuner_base.places import remember_place
from .config import FunLoraConfig
from .layer import FunLoraClassVector, FunLoraConv2d, FunLoraLayer, FunLoraLinear
from .targets import (
    ALL_CONV,
    attentions,
    check_is_called,
    conv_names,
    decoder_middle,
    knows_order,
    projection_names,
)


_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class FunLoraModel(AdapterModel):
    """Creates a FunLoRA model from a model with convolutions or linear layers, such as a diffusers `UNet2DModel`.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`FunLoraConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on meta device. Useful to
            speed up the loading process.

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

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            if not knows_order(model):
                found = {
                    name: None for attention in attentions(model).values() for name in projection_names(attention)
                }
                targets = f" Try the projections of its attention: {list(found)}." if found else ""
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: None means the middle of the decoder of a "
                    "UNet2DModel or UNet2DConditionModel in its standard form, and the model is a "
                    f"{type(model).__name__}.{targets}"
                )
            peft_config.target_modules = set(decoder_middle(model))
        elif peft_config.target_modules == ALL_CONV:
            peft_config.target_modules = set(conv_names(model))
        for path, attention in model.named_modules():
            for name in attention._modules if hasattr(attention, "fused_projections") else ():
                if check_target_module_exists(peft_config, f"{path}.{name}"):
                    check_is_called(f"{path}.{name}", attention)
        if peft_config.class_embedding is not None:
            _check_class_embedding(peft_config, model)
            # PEFT raises if nothing matches, but here the class embedding always does.
            keys = [key for key, _ in model.named_modules()]
            if peft_config.target_modules and not any(check_target_module_exists(peft_config, key) for key in keys):
                raise ValueError(
                    f"Target modules {peft_config.target_modules} not found in the base model. Please check the target modules "
                    "and try again."
                )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return _is_class_embedding(peft_config, key) or check_target_module_exists(peft_config, key)

    def _layer_class(self, peft_config: FunLoraConfig, name: str, target: nn.Module) -> type[FunLoraLayer]:
        if _is_class_embedding(peft_config, name):
            return FunLoraClassVector
        for module_cls, layer_cls in ((nn.Conv2d, FunLoraConv2d), (nn.Linear, FunLoraLinear)):
            # The output projection of torch's MultiheadAttention is never called.
            if isinstance(target, module_cls) and not isinstance(target, NonDynamicallyQuantizableLinear):
                _check_plain(name, target, module_cls)
                return layer_cls
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Conv2d`, `torch.nn.Linear`."
        )


def _is_class_embedding(config: FunLoraConfig, key: str) -> bool:
    name = config.class_embedding
    return name is not None and (key == name or key.endswith(f".{name}"))


def _check_class_embedding(config: FunLoraConfig, model: nn.Module) -> None:
    matches = {key: module for key, module in model.named_modules() if _is_class_embedding(config, key)}
    if not matches:
        raise ValueError(
            f"`class_embedding` is {config.class_embedding!r}, but {type(model).__name__} has no such module. Name its "
            "class embedding (a UNet2DModel has one if it is built with `num_class_embeds`), or pass None."
        )
    for key, module in matches.items():
        check_no_other_method(key, module, FunLoraLayer)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, nn.Embedding):
            raise ValueError(
                f"`class_embedding` is {config.class_embedding!r}, but {key} is a {type(base).__name__}, expected an "
                "nn.Embedding. Name another module, or pass None."
            )
        remember_place(base, model, key)  # the class vector starts at the mean of its rows
        _check_plain(key, base, nn.Embedding)


def _check_plain(name: str, module: nn.Module, module_cls: type[nn.Module]) -> None:
    """Refuse a subclass that overrides forward, and a weight that a quantizer has replaced (torchao, bitsandbytes)."""
    # A weight that a parametrization computes from plain tensors is None here.
    weight = module._parameters.get("weight")
    if type(module).forward is not module_cls.forward:
        problem = f"does not compute as torch's {module_cls.__name__}, for example because it is quantized"
    elif weight is not None and not (
        isinstance(weight, _PLAIN_TENSORS) and type(weight.data) in _PLAIN_TENSORS and weight.is_floating_point()
    ):
        problem = f"has a weight of {type(weight.data).__name__} and {weight.dtype}, which is quantized"
    else:
        return
    raise ValueError(
        f"Target module {name} is a {type(module).__module__}.{type(module).__name__}, which {problem}: FunLoRA needs a "
        "weight that it can read. Load the model without quantization, or name other modules."
    )
