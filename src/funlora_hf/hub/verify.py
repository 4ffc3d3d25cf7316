"""Says of everything in a folder, a file or a repository whether it is sound, and why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ..adapters.base_fingerprint import FingerprintCheck, base_fingerprint, base_tensors
from ..adapters.base_model import base_classes, read_unet
from ..adapters.class_folder import adapter_class, class_of, folder_class
from ..adapters.untrusted_adapter import check_download, read_adapter
from ..adapters.untrusted_bank import SavedBank, read_bank
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .classes_json import INDEX, read_index
from .find import BASE_CONTENTS, Contents, find_contents


BASE_NOT_CHECKED = "base not checked"


@dataclass(frozen=True)
class Verdict:
    """
    On one thing.

    Args:
        kind: "base", "adapter" or "bank".
        name: where it lies.
        ok: whether nothing is wrong with it.
        detail: what is wrong; or, if nothing is, what it was held against.
    """

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
    """
    Check everything that lies in a source: files as such, every number, and whether adapters and base belong together.

    Args:
        source (`str` or `os.PathLike`): as for [`find_contents`].
        base (`str` or `os.PathLike`, *optional*):
            What adapters are held against: run, pipeline or U-Net. None: the base in the source; if it has none, adapters are
            only checked by themselves.
        subfolder, revision, local_files_only: as for [`find_contents`].

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
        raise FileNotFoundError(f"`base` is {os.fspath(base)!r}, which holds no base.")
    return verify_contents(found, sound_base(given.base))


def verify_contents(found: Contents, base: UNet2DModel | None = None) -> list[Verdict]:
    """As `verify`, of what was found already; `base` is used in place of the one found."""
    verdicts = []
    if found.base is not None:
        own: list[UNet2DModel] = []
        verdicts.append(_verdict("base", found.name(found.base), partial(_check_base, found, own)))
        base = next(iter(own), None) if base is None else base
    check = None if base is None else FingerprintCheck(base)
    for folder in found.adapters:
        verdicts.append(_verdict("adapter", found.name(folder), partial(_check_adapter, folder, base, check)))
    for file in found.banks:
        verdicts.append(_verdict("bank", found.name(file), partial(_check_bank, file, base, check)))
    return verdicts


def _verdict(kind: str, name: str, check: Callable[[], str]) -> Verdict:
    try:
        return Verdict(kind, name, True, check())
    except Exception as error:  # the libraries stumble over damaged files in many ways, and each is a finding
        said = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
        return Verdict(kind, name, False, " ".join(said.split()))


def sound_base(folder: Path) -> UNet2DModel:
    """The U-Net in a folder. Raises a ValueError unless it can be loaded and all its tensors are finite."""
    for pattern in BASE_CONTENTS:
        for file in folder.glob(pattern):
            check_download(file)
    base_classes(folder)
    unet = read_unet(folder)
    problems = not_finite(base_tensors(unet))
    if problems:
        raise ValueError(f"{os.fspath(folder)!r} is damaged:\n{listed(problems)}")
    return unet


def _check_base(found: Contents, own: list[UNet2DModel]) -> str:
    """Leaves the U-Net in `own` if it is sound."""
    unet = sound_base(found.base)
    fingerprint = base_fingerprint(unet, dtype=torch.float32)
    index = found.root / INDEX
    if index.is_file():
        stored = (read_index(index.read_text(encoding="utf-8")).base_fingerprint or {}).get("float32", fingerprint)
        if stored != fingerprint:
            raise ValueError(f"its fingerprint is {fingerprint}, but {INDEX} says {stored}.")
    own.append(unet)
    return f"fingerprint {fingerprint}"


def _check_adapter(folder: Path, base: UNet2DModel | None, check: FingerprintCheck | None) -> str:
    adapter = read_adapter(folder)
    adapter.tensors()
    label, _ = class_of(adapter.config)
    if None not in (label, folder_class(folder)) and label != folder_class(folder):
        raise ValueError(f"its folder is {folder.name!r}, but its config says class {label}.")
    adapter_class(folder)  # of other methods, the card has the name
    if base is None:
        return BASE_NOT_CHECKED
    check.check(adapter.config, folder.name)
    adapter.check_fits(base)
    return _held_against(adapter.config)


def _check_bank(file: Path, base: UNet2DModel | None, check: FingerprintCheck | None) -> str:
    check_download(file)
    bank = read_bank(file)
    _check_rows(bank)
    classes = f"{len(bank.classes)} classes, "
    if base is None:
        return classes + BASE_NOT_CHECKED
    check.check(bank.config, file.name)
    bank.check_fits(base)
    return classes + _held_against(bank.config)


def _check_rows(bank: SavedBank) -> None:
    finite = [bool(torch.isfinite(row).all()) for row in bank.rows()]
    damaged = [str(label) for label, sound in zip(bank.classes, finite, strict=True) if not sound]
    if damaged:
        raise ValueError(f"NaN or infinity in class {', '.join(damaged)}.")


def _held_against(config: object) -> str:
    if getattr(config, "base_fingerprint", None) is None:
        return "fits the base (it names no fingerprint)"
    return "made for this base"
