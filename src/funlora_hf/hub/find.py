"""Find what a folder, a file or a repository contains: base, adapters, banks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..adapters.class_folder import ADAPTERS_FOLDER, LORAS_FOLDER, adapter_class, adapter_folders, adapter_name
from ..adapters.untrusted_adapter import ADAPTER_FILES, fetch
from ..adapters.untrusted_bank import read_bank
from ..adapters.untrusted_base import GENERATOR_FOLDERS, PIPELINE, UNET_FOLDER
from ..utils.checks import shortened
from .classes_json import CARD, INDEX
from .concept_folders import CONCEPT_FILES, refuse_concepts
from .what_to_push import SAMPLES


ADAPTER_CONTENTS = (*ADAPTER_FILES, CARD, SAMPLES)
# Files of the base in a pipeline's folder.
BASE_CONTENTS = (PIPELINE, f"{UNET_FOLDER}/*.json", f"{UNET_FOLDER}/*.safetensors", "scheduler/*.json")
# Files of a U-Net without a pipeline.
_UNET_CONTENTS = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json")
_BASE_PLACES = (*GENERATOR_FOLDERS, ".")
_BASE_MARKS = (PIPELINE, "config.json")
_OTHER_WEIGHTS = ("adapter_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Contents:
    """What was found in a source, as it was asked for.

    Args:
        root: folder on this machine; of a bank's file, the folder that it is in.
        base: folder of a pipeline, or of a U-Net by itself.
        adapters: folders of adapters, by rising id; one may be `root` itself.
        banks: files.
    """

    source: str
    root: Path
    base: Path | None
    adapters: tuple[Path, ...]
    banks: tuple[Path, ...]

    def classes(self) -> dict[int, str]:
        """Classes of its adapters and banks, id -> name; a class without a name gets its id as name."""
        found = [adapter_class(folder) for folder in self.adapters]
        names = {one["class_label"]: one["class_name"] or str(one["class_label"]) for one in found}
        names.pop(None, None)
        for file in self.banks:
            names |= read_bank(file).classes
        return names

    def name(self, path: Path) -> str:
        """Name of a folder or file in it, for messages."""
        return self.source if path == self.root else path.relative_to(self.root).as_posix()


def find_contents(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    classes: Collection[int] | None = None,
    with_base: bool = True,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Contents:
    """Find what lies in a source; of a repository, fetch it.

    Args:
        source (`str` or `os.PathLike`): Folder of a run or of a pipeline, of adapters `class_<id>` or of one adapter; a
            bank's file; or a repository laid out as one of these folders, in which banks are not looked for.
        subfolder (`str`, *optional*): where in it.
        classes (collection of `int`, *optional*): ids of the classes wanted, only their files are fetched; None: all.
        with_base (`bool`, *optional*, defaults to `True`): whether the base of a repository is fetched, too.
        revision, local_files_only: as for [`fetch`].

    Raises:
        FileNotFoundError: no such folder or repository, none of the things named in it, or a class that it does not have.
        ConceptsError: concepts of a text-to-image model.
        ValueError: a name that leads out of the repository.
    """
    name = os.fspath(source)
    if os.path.isfile(name):
        return Contents(name, Path(name).parent, None, (), (Path(name),))
    names = ["class_*"] if classes is None else [adapter_name(label) for label in classes]
    folders = ["", *(f"{place}{name}/" for place in ("", f"{ADAPTERS_FOLDER}/") for name in names)]
    files = [*CONCEPT_FILES, *(f"{folder}{file}" for folder in folders for file in ADAPTER_CONTENTS)]
    if with_base:
        files += [INDEX, *_UNET_CONTENTS]
        files += [f"{place}{file}" for place in ("", "base/", "model/") for file in BASE_CONTENTS]
    if subfolder:
        files = [f"{subfolder}/{file}" for file in files]
    root = fetch(name, files, revision=revision, local_files_only=local_files_only) / (subfolder or "")
    refuse_concepts(name, root)
    places = [root / place for place in _BASE_PLACES] if with_base else []
    base = next((place for place in places for file in _BASE_MARKS if (place / file).is_file()), None)
    own = [root] if any((root / file).is_file() for file in ADAPTER_FILES) else []
    below = [*adapter_folders(root), *adapter_folders(root / ADAPTERS_FOLDER)]
    _warn_of_other_folders({root, root / ADAPTERS_FOLDER}, below)
    wanted = [folder for folder in below if classes is None or folder.name in names]
    banks = [file for file in sorted(root.glob("*.safetensors")) if not file.name.startswith(_OTHER_WEIGHTS)]
    found = Contents(name, root, base, (*own, *wanted), tuple(banks))
    place = f"{name!r}" + (f", subfolder {subfolder!r}," if subfolder else "")
    absent = [] if classes is None or own else sorted(set(names) - {folder.name for folder in wanted})
    if absent:
        # The other classes of a repository have not been downloaded.
        others = ", ".join(folder.name for folder in below) if os.path.isdir(name) else ""
        raise FileNotFoundError(f"{place} has no {', '.join(absent)}, expected {others or 'classes that it has'}.")
    if not (found.base or found.adapters or found.banks):
        loras = (
            f"; diffusers' `load_lora_weights` reads the folders in its {LORAS_FOLDER}/"
            if (root / LORAS_FOLDER).is_dir()
            else ""
        )
        raise FileNotFoundError(
            f"{place} has neither a base nor an adapter nor a bank, expected a run, a pipeline, a folder class_<id>, or an "
            f"adapter as PEFT saves it{loras}."
        )
    return found


def _warn_of_other_folders(places: Collection[Path], found: Collection[Path]) -> None:
    """Warn of folders with an adapter's configuration whose name is not that of a class."""
    configs = (file for place in places for file in place.glob(f"[!.]*/{ADAPTER_FILES[0]}"))
    others = sorted(file.parent.name for file in configs if file.parent not in found)
    if others:
        named = shortened(", ".join(others), 1000)
        warnings.warn(
            f"These folders have adapters, but are not named class_<id> and are left out: {named}.", stacklevel=3
        )
