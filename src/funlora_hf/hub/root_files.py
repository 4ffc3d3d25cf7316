"""Read what a repository holds, and make the files at its root when a class is added or deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..adapters.class_folder import adapter_folders, class_of, folder_class
from ..adapters.untrusted_adapter import ADAPTER_FILES, fetch, read_config
from ..cards.model_cards import ClassRow
from .classes_json import INDEX, HubIndex, read_index


def root_files(repo_id: str, present: set[str], index: HubIndex) -> dict[str, bytes]:
    """Card and index of a repository with these files, to which `index` adds."""
    return known_contents(repo_id, present).updated(index).files(repo_id)


def known_contents(repo_id: str, present: set[str]) -> HubIndex:
    """What a repository holds already: what its index says, and adapters that were uploaded in other ways."""
    folders = {name.rpartition("/")[0] for name in present if name.endswith(f"/{ADAPTER_FILES[1]}")}
    if not folders and INDEX not in present:
        return HubIndex()
    root = fetch(repo_id, [INDEX, f"class_*/{ADAPTER_FILES[0]}"])
    index = read_index(root / INDEX) if INDEX in present else HubIndex()
    classes = {folder: row for folder, row in index.classes.items() if folder in folders}
    for path in adapter_folders(root):
        label = folder_class(path)
        if label is not None and path.name in folders and path.name not in classes:
            name = _class_name(path) or str(label)
            classes[path.name] = ClassRow(label, name, "adapter", link=path.name)
    return replace(index, classes=classes)


def _class_name(folder: Path) -> str | None:
    try:
        return class_of(read_config(folder))[1]
    except (OSError, ValueError):
        return None  # a damaged one is listed, and can be deleted, all the same
