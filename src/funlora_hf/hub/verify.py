"""Check everything in a folder, a file or a repository, and report what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ..adapters.base_fingerprint import FingerprintCheck, base_fingerprint, base_tensors, config_fingerprint
from ..adapters.class_folder import adapter_class, class_in_name, class_of
from ..adapters.untrusted_adapter import SavedAdapter, check_download, read_adapter
from ..adapters.untrusted_bank import SavedBank, read_bank
from ..adapters.untrusted_base import base_classes, check_velocity_base, read_unet
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .classes_json import INDEX, read_index
from .find import BASE_CONTENTS, Contents, find_contents


@dataclass(frozen=True)
class Verdict:
    """The result for a "base", an "adapter" or a "bank"; `detail` is what is wrong or, if nothing is, what it was compared with."""

    kind: str
    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {'ok' if self.ok else 'FAILED'}{': ' if not self.ok else ', '}{self.detail}"


def verify(
    source: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> list[Verdict]:
    """Check everything that lies in a source: files as such, every number, and whether adapters and base belong together.

    Args:
        base (`str` or `os.PathLike`, *optional*): What adapters are compared with: run, pipeline or U-Net. None: the base in
            the source; if it has none, adapters are only checked by themselves.
        source, subfolder, revision, local_files_only: as for [`find_contents`].

    Returns:
        `list[Verdict]`: one on each thing, the base first.

    Raises:
        FileNotFoundError: nothing to check.
        ValueError: `base` is damaged.
    """
    found = find_contents(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
    if base is None:
        return verify_contents(found)
    given = find_contents(base, local_files_only=local_files_only)
    if given.base is None:
        raise FileNotFoundError(f"`base` is {os.fspath(base)!r}, which has no base.")
    return verify_contents(found, sound_base(given.base))


def verify_contents(found: Contents, base: UNet2DModel | None = None) -> list[Verdict]:
    """As `verify`, for contents that were found before; `base` replaces the one found."""
    verdicts = []
    if found.base is not None:
        own: list[UNet2DModel] = []
        check = partial(_check_base, found.base, found.root / INDEX, own)
        verdicts.append(verdict_of("base", found.name(found.base), check))
        base = next(iter(own), None) if base is None else base
    fits = partial(_check_fits, base, None if base is None else FingerprintCheck(base))
    for folder in found.adapters:
        verdicts.append(verdict_of("adapter", found.name(folder), partial(_check_adapter, folder, fits)))
    for file in found.banks:
        verdicts.append(verdict_of("bank", found.name(file), partial(_check_bank, file, fits)))
    return verdicts


def verdict_of(kind: str, name: str, check: Callable[[], str]) -> Verdict:
    """Return the verdict on something: `check` returns what it was compared with, or raises."""
    try:
        return Verdict(kind, name, True, check())
    except Exception as error:  # damaged files make the libraries fail in many ways, and each is a finding
        said = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
        return Verdict(kind, name, False, " ".join(said.split()))


def sound_base(folder: Path) -> UNet2DModel:
    """The U-Net in a folder. Raises a ValueError unless it can be loaded and sampled from and all its tensors are finite."""
    for pattern in BASE_CONTENTS:
        for file in folder.glob(pattern):
            check_download(file)
    base_classes(folder)
    check_velocity_base(folder, field="base")
    unet = read_unet(folder)
    problems = not_finite(base_tensors(unet))
    if problems:
        raise ValueError(f"{os.fspath(folder)!r} is damaged:\n{listed(problems)}")
    return unet


def _check_base(folder: Path, index: Path, own: list[UNet2DModel]) -> str:
    """Append the U-Net to `own` if it is valid."""
    unet = sound_base(folder)
    fingerprint = base_fingerprint(unet, dtype=torch.float32)
    if index.is_file():
        known = read_index(index).base_fingerprint or {}
        for name, value in {"float32": fingerprint, **config_fingerprint(unet)}.items():
            if (stored := known.get(name, value)) != value:
                raise ValueError(f"its fingerprint is {value} ({name}), but {INDEX} says {stored}.")
    own.append(unet)
    return f"fingerprint {fingerprint}"


def _check_adapter(folder: Path, fits: Callable[[SavedAdapter, str], str]) -> str:
    adapter = read_adapter(folder)
    adapter.tensors()
    label, named = class_of(adapter.config)[0], class_in_name(folder.name)
    if None not in (label, named) and label != named:
        raise ValueError(f"its folder is {folder.name!r}, but its config says class {label}.")
    adapter_class(folder)  # for other methods, the name is in the card
    return fits(adapter, folder.name)


def _check_bank(file: Path, fits: Callable[[SavedBank, str], str]) -> str:
    check_download(file)
    bank = read_bank(file)
    rows = zip(bank.classes, bank.rows(), strict=True)
    damaged = [str(label) for label, row in rows if not torch.isfinite(row).all()]
    if damaged:
        raise ValueError(f"NaN or infinity in class {', '.join(damaged)}.")
    return f"{len(bank.classes)} classes, {fits(bank, file.name)}"


def _check_fits(
    base: UNet2DModel | None, check: FingerprintCheck | None, saved: SavedAdapter | SavedBank, name: str
) -> str:
    if base is None or check is None:
        return "base not checked"
    is_known = getattr(saved.config, "base_fingerprint", None) is not None
    if is_known:
        check.check(saved.config, name)
    saved.check_fits(base)
    return (
        "made for this base" if is_known else "its shapes fit, base not checked: its config has no fingerprint of it"
    )
