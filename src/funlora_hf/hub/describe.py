"""Describe what a folder, a file or a repository contains, as plain data. No adapter is loaded into a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.base_fingerprint import FingerprintCheck, base_fingerprint
from ..adapters.class_folder import adapter_class
from ..adapters.untrusted_adapter import method, read_adapter
from ..adapters.untrusted_bank import read_bank
from ..adapters.untrusted_base import base_classes, read_unet
from ..tuner import FunLoraConfig
from .find import find_contents


@dataclass(frozen=True)
class BaseDescription:
    """A base: where it lies, names of its classes by id, parameters of its U-Net, and its fingerprint in float32."""

    name: str
    classes: dict[int, str]
    parameters: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _StoredDescription:
    """Fields of both adapters and banks.

    Args:
        name: its place in the source.
        method: name of the PEFT method.
        function: FunLoRA's function; None for other methods.
        operation: FunLoRA's operation; None for other methods.
        num_bytes: size of its weight file.
        base_model: the base that it names.
        base_matches: whether its fingerprint is that of the base in the source; None: one of the two is missing.
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
    """Of one adapter: its class, as far as it says which, and how many numbers it holds."""

    class_label: int | None
    class_name: str | None
    parameters: int


@dataclass(frozen=True, kw_only=True)
class BankDescription(_StoredDescription):
    """Of one bank: names of its classes by id, and how many numbers each has."""

    classes: dict[int, str]
    parameters_per_class: int


@dataclass(frozen=True)
class Description:
    """What lies in a source, by the name that was asked for: its base, adapters by rising id, and banks by name."""

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
    """Describe what lies in a source, as `find_contents` takes it.

    Raises:
        FileNotFoundError: nothing to describe.
        ValueError: a damaged file, which is named; `verify` also checks the others.
    """
    found = find_contents(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
    base = check = None
    if found.base is not None:
        unet = read_unet(found.base)
        check, fingerprint = FingerprintCheck(unet), base_fingerprint(unet, dtype=torch.float32)
        name, classes = found.name(found.base), base_classes(found.base)
        base = BaseDescription(name, classes, unet.num_parameters(), fingerprint)

    def stored(config: PeftConfig, place: Path, weights: Path) -> dict[str, Any]:
        own = config if isinstance(config, FunLoraConfig) else None
        return {
            "name": found.name(place),
            "method": method(config),
            "function": own.function if own else None,
            "operation": own.operation if own else None,
            "num_bytes": weights.stat().st_size,
            "base_model": config.base_model_name_or_path,
            "base_matches": check.fits(own.base_fingerprint) if check and own and own.base_fingerprint else None,
        }

    adapters, banks = [], []
    for folder in found.adapters:
        adapter = read_adapter(folder)
        said = stored(adapter.config, folder, folder / SAFETENSORS_WEIGHTS_NAME)
        adapters.append(AdapterDescription(**said, **adapter_class(folder), parameters=adapter.numel))
    for file in found.banks:
        bank = read_bank(file)
        said = stored(bank.config, file, file)
        banks.append(BankDescription(**said, classes=bank.classes, parameters_per_class=bank.numel))
    return Description(found.source, base, adapters, banks)
