"""Put a saved adapter into a PeftModel, or leave the model as it was."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..tuner_base.wrappers import remove_adapters, without_peft
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_name as class_adapter_name
from .class_folder import class_of
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
) -> PeftModel:
    """
    Load an adapter as PEFT does, after checks that it is valid and was trained for this base.

    Args:
        model (`torch.nn.Module`): the base, such as a `UNet2DModel`, or a PeftModel of it that gets one adapter more.
        source (`str` or `os.PathLike`): a folder written by PEFT's `save_pretrained`, or a repository on the Hub.
        adapter_name (`str`, *optional*): its name in the model; None: `class_<id>` of its class, or "default".
        subfolder (`str`, *optional*): the adapter's folder in it.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): take a repository from the cache, without asking the Hub.
        ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): load it also if it was trained for another base.
            What is saved then names this one.

    Returns:
        `PeftModel`: in evaluation mode; the first adapter loaded is the active one.

    Raises:
        BaseMismatchError: the adapter was trained for another base.
        ValueError: it does not fit the model, is damaged, or its name is taken. The model is as it was.
        FileNotFoundError: no such folder, repository or adapter in it.

    Example:
        ```py
        >>> unet = UNet2DModel.from_pretrained("user/digits", subfolder="unet")
        >>> model = load_adapter(unet, "user/digits", subfolder="class_7")
        ```
    """
    adapter = read_adapter(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
    if adapter_name is None:
        label, _ = class_of(adapter.config)
        adapter_name = "default" if label is None else class_adapter_name(label)
    peft_model = model if isinstance(model, PeftModel) else None
    if peft_model is not None and adapter_name in peft_model.peft_config:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which the model has already: pass another one.")
    config = FingerprintCheck(model).accepted(adapter.config, adapter.source, ignore=ignore_base_fingerprint)
    adapter = replace(adapter, config=config)
    try:
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
    training = base.training
    adapter.check_fits(base)
    tensors = adapter.tensors()
    config = exact_targets(adapter.config, adapter.shapes)
    try:
        if peft_model is None:
            peft_model = PeftModel(base, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
        loaded: Any = set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
        # PEFT only warns of what is missing, and that part would act as the identity.
        missing = [key for key in loaded.missing_keys if f".{name}." in f"{key}."]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"missing tensors {missing}, unexpected tensors {loaded.unexpected_keys}")
        # Numbers that the file holds in a wider type may be too large here.
        problems = not_finite(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
        if problems:
            raise ValueError(f"it has numbers that are too large:\n{listed(problems)}")
        restore_targets(peft_model.peft_config[name], adapter.config)
        peft_model.eval()
    except Exception:
        remove_adapters(base, [name])
        raise
    finally:
        base.train(training)
    return peft_model
