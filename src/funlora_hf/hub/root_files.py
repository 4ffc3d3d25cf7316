"""What a repository holds now, read from it, and the files at its root when a class comes or goes.

Joins the index and the Hub.
"""

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
    """What a repository holds already: what its index says, and adapters that came by other ways."""
    folders = {name.partition("/")[0] for name in present if name.endswith(f"/{ADAPTER_FILES[1]}")}
    root = fetch(repo_id, [INDEX, f"class_*/{ADAPTER_FILES[0]}"]) if folders or INDEX in present else None
    index = HubIndex()
    if INDEX in present:
        index = read_index((root / INDEX).read_text(encoding="utf-8"))
        index = index.only(
            [row.link for row in index.adapters.values() if row.folder is None or row.folder in folders]
        )
    others = {}
    for folder in adapter_folders(root) if folders else ():
        if folder.name in folders and folder.name not in index.adapters:
            label = folder_class(folder)
            others[folder.name] = ClassRow(
                label, _class_name(folder) or str(label), "adapter", None, None, None, folder.name
            )
    return replace(index, adapters={**index.adapters, **others})


def root_files_without(repo_id: str, present: set[str], class_label: int) -> dict[str, bytes]:
    """Card and index of a repository without a class; none where its card is not ours."""
    return known_contents(repo_id, present).without(class_label).files(repo_id) if INDEX in present else {}


def _class_name(folder: Path) -> str | None:
    try:
        return class_of(read_config(folder))[1]
    except (OSError, ValueError):
        return None  # a damaged one is listed, and can be deleted, all the same
