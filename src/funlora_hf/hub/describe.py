"""Describe what a folder, a file or a repository contains, as plain data. No adapter is loaded into a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.base_fingerprint import BaseMismatchError, FingerprintCheck, base_fingerprint
from ..adapters.class_folder import adapter_class
from ..adapters.untrusted_adapter import method, read_adapter
from ..adapters.untrusted_bank import read_bank
from ..adapters.untrusted_base import base_classes, read_unet
from ..tuner import FunLoraConfig
from .find import find_contents


@dataclass(frozen=True)
class BaseDescription:
    """
    Args:
        name: where it lies.
        classes: id -> name.
        parameters: of the U-Net.
        fingerprint: in float32.
    """

    name: str
    classes: dict[int, str]
    parameters: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _StoredDescription:
    """
    What an adapter and a bank both say.

    Args:
        name: where it lies.
        method: of PEFT.
        function: of FunLoRA; None for other methods.
        operation: of FunLoRA; None for other methods.
        num_bytes: size of its weight file.
        base_model: the base that it names.
        base_matches: whether its fingerprint is that of the base beside it; None: one of the two is not there.
    """

    name: str
    method: str
    function: str | None
    operation: str | None
    num_bytes: int
    base_model: str | None
    base_matches: bool | None


@dataclass(frozen=True, kw_only=True)
class AdapterDescription(_StoredDescription):
    """
    Args:
        class_label: id of its class; None: it does not say.
        class_name: of its class; None: it does not say.
        parameters: how many numbers it holds.
    """

    class_label: int | None
    class_name: str | None
    parameters: int


@dataclass(frozen=True, kw_only=True)
class BankDescription(_StoredDescription):
    """
    Args:
        classes: id -> name.
        parameters_per_class: how many numbers a class has.
    """

    classes: dict[int, str]
    parameters_per_class: int


@dataclass(frozen=True)
class Description:
    """
    Args:
        source: as it was asked for.
        base: None: there is none.
        adapters: by rising id.
        banks: by name.
    """

    source: str
    base: BaseDescription | None
    adapters: list[AdapterDescription] = field(default_factory=list)
    banks: list[BankDescription] = field(default_factory=list)


def describe(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Description:
    """
    Describe what lies in a source.

    Args:
        source, subfolder, revision, local_files_only: as for [`find_contents`].

    Returns:
        [`Description`].

    Raises:
        FileNotFoundError: nothing to describe.
        ValueError: a damaged file, which is named; `verify` looks at the others, too.
    """
    found = find_contents(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
    base = check = None
    if found.base is not None:
        unet = read_unet(found.base)
        check, fingerprint = FingerprintCheck(unet), base_fingerprint(unet, dtype=torch.float32)
        name, classes = found.name(found.base), base_classes(found.base)
        base = BaseDescription(name, classes, unet.num_parameters(), fingerprint)
    adapters = [_adapter(folder, found.name(folder), check) for folder in found.adapters]
    banks = [_bank(file, found.name(file), check) for file in found.banks]
    return Description(found.source, base, adapters, banks)


def _adapter(folder: Path, name: str, check: FingerprintCheck | None) -> AdapterDescription:
    adapter = read_adapter(folder)
    stored = _stored(adapter.config, folder / SAFETENSORS_WEIGHTS_NAME, name, check)
    return AdapterDescription(**stored, **adapter_class(folder), parameters=adapter.numel)


def _bank(file: Path, name: str, check: FingerprintCheck | None) -> BankDescription:
    bank = read_bank(file)
    stored = _stored(bank.config, file, name, check)
    return BankDescription(**stored, classes=bank.classes, parameters_per_class=bank.numel)


def _stored(config: PeftConfig, file: Path, name: str, check: FingerprintCheck | None) -> dict[str, Any]:
    own = config if isinstance(config, FunLoraConfig) else None
    return {
        "name": name,
        "method": method(config),
        "function": own.function if own else None,
        "operation": own.operation if own else None,
        "num_bytes": file.stat().st_size,
        "base_model": config.base_model_name_or_path,
        "base_matches": _matches(check, config, name),
    }


def _matches(check: FingerprintCheck | None, config: PeftConfig, name: str) -> bool | None:
    if check is None or getattr(config, "base_fingerprint", None) is None:
        return None
    try:
        check.check(config, name)
    except BaseMismatchError:
        return False
    return True
