"""Start an adapter at the mean of saved ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..tuner import FunLoraConfig
from ..tuner.hotswap import hotswap_adapter, plain_key, saved_tensors, wrapped_model
from ..utils.checks import check_started_from, listed
from ..utils.files import file_sha256
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_configs, class_of
from .class_folder import adapter_name as class_adapter_name
from .class_rows import differing_settings
from .untrusted_adapter import SavedAdapter, differences, read_adapter


def start_from(model: nn.Module, adapters: Sequence[str | os.PathLike], adapter_name: str = "default") -> None:
    """
    Set a new adapter of a model to the mean of saved ones: A, B, alpha, omega and the class vector. Call it before training.

    The adapter's config, its card and `funlora delete` then name those that it started from. What it learns depends on their images,
    so that only an adapter without such a start is free of a class that is deleted.

    Args:
        model (`torch.nn.Module`): a PeftModel, or a model with adapters inside.
        adapters (sequence of `str` or `os.PathLike`): FunLoRA adapters of the same configuration, for the same base: folders, or
            repositories that have the adapter at their root. Their order does not matter.
        adapter_name (`str`, *optional*, defaults to `"default"`): name of the new adapter in the model.

    Raises:
        BaseMismatchError: one of them was trained for another base.
        ValueError: no adapters, two of one name, one that does not fit the new adapter, or no such FunLoRA adapter in the model.
            Nothing has changed then.
        FileNotFoundError: no such folder or repository, or no adapter in it.

    Source: [ours].

    Example:
        ```py
        >>> model = get_peft_model(unet, FunLoraConfig(class_embedding="class_embedding"))
        >>> start_from(model, ["outputs/digits/adapters/class_2", "outputs/digits/adapters/class_3"])
        ```
    """
    if isinstance(adapters, (str, os.PathLike)) or not adapters:
        raise ValueError(f"`adapters` is {adapters!r}, expected a list of folders of adapters, one at least.")
    saved, check = [read_adapter(source) for source in adapters], FingerprintCheck(model)
    for one in saved:
        check.check(one.config, one.source)
        if problems := misfits(model, one, adapter_name):
            raise ValueError(f"The adapter {one.source!r} is unlike {adapter_name!r}:\n{listed(problems)}")
    set_to_mean(model, saved, adapter_name)


def misfits(model: nn.Module, saved: SavedAdapter, adapter_name: str) -> list[str]:
    """Return a line for each difference in configuration and tensors between a saved adapter and one of a model."""
    own = _config(model, adapter_name)
    settings = differing_settings(saved.config, own)
    lines = [f"`{name}` is {found!r}, expected {expected!r}" for name, found, expected in settings]
    return [*lines, *differences(dict(saved_tensors(wrapped_model(model), adapter_name)), saved.shapes)]


def set_to_mean(model: nn.Module, saved: Sequence[SavedAdapter], adapter_name: str) -> None:
    """Do as `start_from` with adapters without `misfits`, for the same base."""
    named = {_name(one): one for one in sorted(saved, key=_name)}
    if len(named) < len(saved):
        raise ValueError(f"`adapters` has two of one name among {', '.join(map(_name, saved))}: leave one out.")
    digests = {name: file_sha256(one.folder / one.weights) for name, one in named.items()}
    check_started_from(digests)
    sums: dict[str, torch.Tensor] = {}
    for one in named.values():
        for key, tensor in one.tensors().items():
            sums[plain_key(key)] = sums.get(plain_key(key), 0.0) + tensor.double()
    hotswap_adapter(model, {key: total / len(named) for key, total in sums.items()}, adapter_name)
    _config(model, adapter_name).started_from = digests


def _config(model: nn.Module, adapter_name: str) -> FunLoraConfig:
    configs = adapter_configs(extract_model_from_parallel(model, keep_torch_compile=False))
    config = configs.get(adapter_name)
    if not isinstance(config, FunLoraConfig):
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, expected a FunLoRA adapter of the model: {list(configs)}."
        )
    return config


def _name(saved: SavedAdapter) -> str:
    label, _ = class_of(saved.config, saved.folder.name)
    return Path(saved.source).name if label is None else class_adapter_name(label)
