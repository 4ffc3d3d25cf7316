"""Put a saved adapter into a model, or leave the model as it was."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders.peft import PeftAdapterMixin
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..tuner.hotswap import SAVED_PREFIX, plain_key
from ..tuner_base.wrappers import remove_adapters, without_peft
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_configs, class_of
from .class_folder import adapter_name as class_adapter_name
from .class_rows import inject
from .untrusted_adapter import SavedAdapter, brief, exact_targets, read_adapter, restore_targets


def load_adapter(
    model: nn.Module,
    source: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    ignore_base_fingerprint: bool = False,
    config: PeftConfig | None = None,
    weight_name: str | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Load an adapter, after checks that it is valid and was trained for this base.

    Args:
        model (`torch.nn.Module`): The base: a component of a pipeline such as `pipe.unet` or `pipe.transformer`, a
            `UNet2DModel`, or a PeftModel, which gets one more adapter.
        source (`str` or `os.PathLike`): A folder written by [`save_adapter`] or PEFT's `save_pretrained`, or by
            `save_lora_adapter` or `save_lora_weights` of diffusers, or a repository on the Hub.
        adapter_name (`str`, *optional*): its name in the model; None: `class_<id>` of its class, or "default".
        subfolder (`str`, *optional*): the adapter's folder in the source.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): use the cached repository, without asking the Hub.
        ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): load it even if it was trained for another base.
            If it is saved again, its files name this base.
        config (`PeftConfig`, *optional*): config of the adapter, if the files have none, as those of `save_lora_weights`.
        weight_name (`str`, *optional*): name of a file of diffusers, if it is not `pytorch_lora_weights.safetensors`.
        prefix (`str`, *optional*): For a file of `save_lora_weights`: the part of the pipeline whose adapter to load, such as
            "text_encoder". None: the model that denoises, if the file has its adapter.

    Returns:
        `torch.nn.Module`: in evaluation mode. For a model of diffusers with `add_adapter` (its `PeftAdapterMixin`) it is `model`
            itself, so that `pipe.set_adapters`, `disable_lora`, `fuse_lora` and `delete_adapters` know the adapter, which is active
            as after `load_lora_weights`. For any other model it is a `PeftModel`, in which the first adapter loaded is active.

    Raises:
        BaseMismatchError: the adapter was trained for another base.
        ValueError: it does not fit the model, is damaged, or its name is taken. The model is unchanged.
        FileNotFoundError: no such folder, repository or adapter in it.

    Example:
        ```py
        >>> load_adapter(pipe.unet, "user/subject")
        >>> model = load_adapter(UNet2DModel.from_pretrained("user/digits", subfolder="unet"), "user/digits", subfolder="class_7")
        ```
    """
    adapter = read_adapter(
        source,
        subfolder=subfolder,
        revision=revision,
        local_files_only=local_files_only,
        config=config,
        weight_name=weight_name,
        prefix=prefix,
    )
    if adapter_name is None:
        label, _ = class_of(adapter.config)
        adapter_name = "default" if label is None else class_adapter_name(label)
    if isinstance(model, (PeftModel, PeftAdapterMixin)) and adapter_name in adapter_configs(model):
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which the model has already: pass another one.")
    accepted = FingerprintCheck(model).accepted(adapter.config, adapter.source, ignore=ignore_base_fingerprint)
    adapter = replace(adapter, config=accepted)
    try:
        return put_adapter(model, adapter, adapter_name, inside=isinstance(model, PeftAdapterMixin)).eval()
    except Exception as error:
        raise ValueError(f"The adapter {adapter.source!r} does not fit this base: {brief(error)}") from error


def with_adapter_methods(model: Any) -> Any:
    """Return a model of diffusers; if it is one without `add_adapter`, such as PixArt's, it gets the methods of the others, in place.

    It then has a subclass of its class, of the same name, and cannot be pickled.
    """
    kind = type(model)
    if isinstance(model, ModelMixin) and not isinstance(model, PeftAdapterMixin):
        model.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})
    return model


def put_adapter(model: Any, adapter: SavedAdapter, name: str, *, inside: bool = False) -> Any:
    """Put an adapter into a model, whose layers are wrapped in place.

    Args:
        model: the base, or a `PeftModel`, which gets one more adapter.
        adapter: as from `read_adapter`.
        name: name of the adapter in the model.
        inside: whether to use no `PeftModel`, as `load_lora_adapter` of diffusers.

    Returns:
        A `PeftModel`, or `model` if the adapter is `inside`; its parts are in evaluation mode.

    Raises:
        ValueError: the adapter does not fit; or what PEFT raises. The model is unchanged.
    """
    base = without_peft(model)
    training = base.training
    adapter.check_fits(base)
    prefix = "" if inside else SAVED_PREFIX
    tensors = {f"{prefix}{plain_key(key)}": tensor for key, tensor in adapter.tensors().items()}
    config = exact_targets(adapter.config, adapter.shapes)
    try:
        if inside:
            inject(model, config, name)
        elif isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(base, config, adapter_name=name)
        loaded: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
        # PEFT only warns of missing tensors, and their part would act as the identity.
        missing = [key for key in loaded.missing_keys if f".{name}." in f"{key}."]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"missing tensors {missing}, unexpected tensors {loaded.unexpected_keys}")
        # Numbers of a wider type in the file may be too large here.
        problems = not_finite(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
        if problems:
            raise ValueError(f"it has numbers that are too large:\n{listed(problems)}")
        restore_targets(model.peft_config[name], adapter.config)
        model.eval()
    except Exception:
        remove_adapters(base, [name])
        raise
    finally:
        base.train(training)
    if inside:
        model._hf_peft_config_loaded = True
    return model
