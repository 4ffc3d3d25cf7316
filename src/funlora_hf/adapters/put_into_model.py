"""Put a saved adapter into a model, or leave the model as it was."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from ..tuner.hotswap import SAVED_PREFIX, plain_key
from ..tuner_base.wrappers import remove_adapters, without_peft
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_configs, class_of
from .class_folder import adapter_name as class_adapter_name
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
    """
    Load an adapter, after checks that it is valid and was trained for this base.

    Args:
        model (`torch.nn.Module`):
            The base: a component of a pipeline such as `pipe.unet` or `pipe.transformer`, a `UNet2DModel`, or a PeftModel, which
            gets one adapter more.
        source (`str` or `os.PathLike`):
            A folder written by [`save_adapter`] or PEFT's `save_pretrained`, or by `save_lora_adapter` or `save_lora_weights` of
            diffusers, or a repository on the Hub.
        adapter_name (`str`, *optional*): its name in the model; None: `class_<id>` of its class, or "default".
        subfolder (`str`, *optional*): the adapter's folder in it.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): take a repository from the cache, without asking the Hub.
        ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): load it also if it was trained for another base.
            What is saved then names this one.
        config (`PeftConfig`, *optional*): of the adapter, if the files have none, as those of `save_lora_weights`.
        weight_name (`str`, *optional*): of a file of diffusers, if it is another than `pytorch_lora_weights.safetensors`.
        prefix (`str`, *optional*):
            Of a file of `save_lora_weights`: the part of the pipeline whose adapter is wanted, such as "text_encoder". None: the model
            that denoises, if the file has its adapter.

    Returns:
        `torch.nn.Module`: in evaluation mode. A model of diffusers with `add_adapter` (its `PeftAdapterMixin`) is `model` itself,
            so that `pipe.set_adapters`, `disable_lora`, `fuse_lora` and `delete_adapters` know the adapter, which is active as
            after `load_lora_weights`. For any other one a `PeftModel`, of which the first adapter loaded is active.

    Raises:
        BaseMismatchError: the adapter was trained for another base.
        ValueError: it does not fit the model, is damaged, or its name is taken. The model is as it was.
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
        if isinstance(model, PeftAdapterMixin):
            return _inject(model, adapter, adapter_name)
        peft_model = model if isinstance(model, PeftModel) else None
        return put_adapter(without_peft(model), peft_model, adapter, adapter_name).eval()
    except Exception as error:
        raise ValueError(f"The adapter {adapter.source!r} does not fit this base: {brief(error)}") from error


def put_adapter(base: nn.Module, peft_model: PeftModel | None, adapter: SavedAdapter, name: str) -> PeftModel:
    """Put an adapter into a model, whose layers are wrapped in place; `peft_model` holds the adapters that it has, if any.

    Returns:
        `PeftModel`, with its parts in evaluation mode.

    Raises:
        ValueError: the adapter does not fit; or what PEFT raises. The model is as it was.
    """

    def add(config: PeftConfig) -> PeftModel:
        if peft_model is None:
            return PeftModel(base, config, adapter_name=name)
        peft_model.add_adapter(name, config)
        return peft_model

    return _put(base, adapter, name, add, prefix=SAVED_PREFIX)


def _inject(model: Any, adapter: SavedAdapter, name: str) -> nn.Module:
    """Put an adapter into a model of diffusers, as its `load_lora_adapter` does."""

    def add(config: PeftConfig) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            return inject_adapter_in_model(config, model, name)

    _put(model, adapter, name, add, prefix="")
    model._hf_peft_config_loaded = True
    return model.eval()


def _put(base: nn.Module, adapter: SavedAdapter, name: str, add: Callable[[PeftConfig], Any], *, prefix: str) -> Any:
    """What `add(config)` returns, filled with the adapter's tensors, whose names begin with `prefix` there."""
    training = base.training
    adapter.check_fits(base)
    tensors = {f"{prefix}{plain_key(key)}": tensor for key, tensor in adapter.tensors().items()}
    config = exact_targets(adapter.config, adapter.shapes)
    try:
        model = add(config)
        loaded: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
        # PEFT only warns of what is missing, and that part would act as the identity.
        missing = [key for key in loaded.missing_keys if f".{name}." in f"{key}."]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"missing tensors {missing}, unexpected tensors {loaded.unexpected_keys}")
        # Numbers that the file holds in a wider type may be too large here.
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
    return model
