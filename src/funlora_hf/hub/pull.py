"""Copy classes from a repository into the folder of a run, after checking all of them."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..adapters.base_fingerprint import base_fingerprint, config_fingerprint
from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders, adapter_name
from ..adapters.untrusted_adapter import check_download
from ..adapters.untrusted_base import read_unet
from ..utils.files import whole_folder
from ..utils.locks import folder_lock
from .find import ADAPTER_CONTENTS, BASE_CONTENTS, Contents, find_contents
from .verify import sound_base, verify_contents


BASE_FOLDER = "base"


def pull(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    classes: Collection[int] | None = None,
    with_base: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
) -> list[Path]:
    """Copy classes, and their base if asked for, as the folder of a run has them: `adapters/class_<id>/` and `base/`.

    Only configs, safetensors, cards and pictures are taken. All of it is checked before anything is written; adapters also against
    the base, the one that comes along or that of `output_dir`.

    Args:
        source (`str` or `os.PathLike`): repository with folders `class_<id>`, or with one adapter; or a folder laid out like it.
        output_dir (`str` or `os.PathLike`): where to.
        classes (collection of `int`, *optional*): ids of the classes wanted; None: all there are.
        with_base (`bool`, *optional*, defaults to `False`): take the base, too.
        overwrite (`bool`, *optional*, defaults to `False`): replace folders of other content in `output_dir`.
        revision, local_files_only: as for [`fetch`].

    Returns:
        `list[Path]`: the folders written; those that had this content already are left out.

    Raises:
        FileNotFoundError: no such repository or class, no base though asked for.
        FileExistsError: a folder is there with other content.
        ValueError: something is damaged, or does not belong to the base; or a base that other adapters need would be replaced.
        FolderInUseError: a run is at work in `output_dir`.
    """
    output_dir = Path(output_dir)
    found = find_contents(
        source, classes=classes, with_base=with_base, revision=revision, local_files_only=local_files_only
    )
    if with_base and found.base is None:
        raise FileNotFoundError(
            f"{found.source!r} has no base: leave out `with_base`, or pull from the repository of the base."
        )
    present = output_dir / BASE_FOLDER
    base = sound_base(present) if found.base is None and present.is_dir() else None
    for verdict in verify_contents(replace(found, banks=()), base):
        if not verdict.ok:
            raise ValueError(f"{verdict.kind} {verdict.name!r} of {found.source!r}: {verdict.detail}")
    copies = _copies(found, output_dir, classes)
    if found.base is not None:
        copies[present] = _files(found.base, BASE_CONTENTS)
    differ = {target: files for target, files in copies.items() if not _has(target, files)}
    there = [os.fspath(target) for target in differ if target.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{', '.join(there)}: exists already, with different content than in {found.source!r}. Pass --overwrite to replace it, or "
            "another folder."
        )
    if found.base is not None:
        _check_base_is_not_needed(found.base, differ, output_dir)
    with folder_lock(output_dir):
        for target, files in differ.items():
            with whole_folder(target) as temporary:
                for name, file in files.items():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, temporary / name)
    return list(differ)


def _check_base_is_not_needed(base: Path, differ: Collection[Path], output_dir: Path) -> None:
    """Raise a ValueError if a base would be replaced, by one of other weights or settings, that adapters in the folder were trained for."""
    target = output_dir / BASE_FOLDER
    others = [folder.name for folder in adapter_folders(output_dir / ADAPTERS_FOLDER) if folder not in differ]
    if target not in differ or not target.is_dir() or not others:
        return
    if _identity(base) != _identity(target):
        raise ValueError(
            f"`overwrite` would replace {os.fspath(target)!r}, the base of {', '.join(others)}: pull into another folder."
        )


def _identity(base: Path) -> tuple[str, dict[str, str]]:
    unet = read_unet(base)
    return base_fingerprint(unet), config_fingerprint(unet)


def _copies(found: Contents, output_dir: Path, classes: Collection[int] | None) -> dict[Path, dict[str, Path]]:
    """The files of each folder to write."""
    copies: dict[Path, dict[str, Path]] = {}
    for folder in found.adapters:
        label = adapter_class(folder)["class_label"]
        if label is None:
            raise ValueError(f"The adapter {found.name(folder)!r} does not say which class it is.")
        if classes is not None and label not in classes:
            raise ValueError(
                f"The adapter {found.name(folder)!r} is of class {label}, which is not in {sorted(classes)}."
            )
        target = output_dir / ADAPTERS_FOLDER / adapter_name(label)
        if target in copies:
            raise ValueError(f"{found.source!r} has two adapters of class {label}: pull only one of them.")
        copies[target] = _files(folder, ADAPTER_CONTENTS)
    return copies


def _files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern)}
    for file in files.values():
        check_download(file)
    return files


def _has(target: Path, files: Mapping[str, Path]) -> bool:
    """Whether a folder holds exactly these files, by name, with the same content."""
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    return there == files.keys() and all(
        filecmp.cmp(target / name, file, shallow=False) for name, file in files.items()
    )
