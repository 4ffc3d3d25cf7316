"""`classes.json`: what a repository contains. Its card is made from this file when a class is added or deleted."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..adapters.class_folder import adapter_folders, class_in_name, class_of
from ..adapters.untrusted_adapter import ADAPTER_FILES, fetch_repository, read_config
from ..cards.model_cards import ClassRow, repository_card
from ..utils.files import read_mapping
from .concept_folders import refuse_concepts_of_repository


INDEX = "classes.json"
CARD = "README.md"
# Fields of results.json that a card shows.
_SHOWN = ("dataset", "seed", "LA", "AIA", "tasks", "class_order", "class_accuracy", "versions", "settings")
_KINDS = {"base_class": str, "classes": list, "base_classes": dict, "base_fingerprint": dict, "results": dict}


@dataclass(frozen=True)
class HubIndex:
    """What a repository holds.

    Args:
        base_model: repository of the base, "user/repo"; None: unknown.
        base_revision: branch, tag or commit of it.
        base_is_unet: whether its repository is the U-Net itself, not a pipeline; None: unknown.
        base_class: the class of a base in a pipeline of diffusers that is no `UNet2DModel`.
        base_classes: id -> name, if the base is in this repository; else None.
        base_fingerprint: of the base in this repository, by precision.
        classes: folder -> row of each class that an adapter makes.
        results: what the card shows of the results.json of the run.
        license: identifier of a licence.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_is_unet: bool | None = None
    base_class: str | None = None
    base_classes: Mapping[int, str] | None = None
    base_fingerprint: Mapping[str, str] | None = None
    classes: Mapping[str, ClassRow] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    license: str | None = None

    def updated(self, new: HubIndex) -> HubIndex:
        """Return this index with what `new` knows; all else stays, including the base in this repository."""
        kept = {name: value for name, value in vars(new).items() if value is not None}
        if self.base_classes is not None and new.base_classes is None:
            for name in ("base_model", "base_revision", "base_is_unet"):
                kept.pop(name, None)
        return replace(self, **{**kept, "classes": {**self.classes, **new.classes}})

    def without(self, class_label: int) -> HubIndex:
        """Return this index without a class."""
        classes = {folder: row for folder, row in self.classes.items() if row.class_label != class_label}
        results = None if self.results is None else results_without(self.results, {class_label})
        return replace(self, classes=classes, results=results)

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Return the card and this index as files of the repository `repo_id`."""
        rows = sorted(self.classes.values(), key=lambda row: row.class_label)
        accuracy = (self.results or {}).get("class_accuracy") or {}
        has_base = self.base_classes is not None
        own = [
            ClassRow(label, name, "base", accuracy=accuracy.get(str(label)))
            for label, name in (self.base_classes or {}).items()
        ]
        card = repository_card(
            repo_id,
            [*own, *rows],
            kind="base" if has_base else "adapter",
            base=None if has_base else self.base_model,
            base_revision=None if has_base else self.base_revision,
            base_is_unet=bool(self.base_is_unet) and not has_base,
            base_class=None if has_base else self.base_class,
            base_fingerprints=self.base_fingerprint,
            results=self.results,
            license=self.license,
        )
        contents = {**vars(self), "classes": [asdict(row) for row in rows]}
        return {CARD: str(card).encode(), INDEX: (json.dumps(contents, indent=2) + "\n").encode()}


def shown_results(results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the fields of a run's results that a card shows, without local paths."""
    if results is None:
        return None
    shown = {name: results[name] for name in _SHOWN if name in results}
    shown["settings"] = {
        part: {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float, type(None))) or (isinstance(value, str) and not set(value) & set("/\\"))
        }
        for part, values in shown.get("settings", {}).items()
    }
    return shown


def results_without(results: Mapping[str, Any], class_labels: Collection[int]) -> dict[str, Any]:
    """Return a run's results without some classes, wherever a card would name them."""
    kept = dict(results)
    if "tasks" in kept:
        kept["tasks"] = [[c for c in task if c not in class_labels] for task in kept["tasks"]]
    if "class_order" in kept:
        kept["class_order"] = [c for c in kept["class_order"] if c not in class_labels]
    if kept.get("class_accuracy"):
        gone = set(map(str, class_labels))
        kept["class_accuracy"] = {key: value for key, value in kept["class_accuracy"].items() if key not in gone}
    return kept


def read_index(file: Path) -> HubIndex:
    """Read the index from a file.

    Raises:
        ValueError: the file does not have the form that `HubIndex.files` writes.
    """
    try:
        given = {"base_is_unet": None, "base_class": None, **read_mapping(file)}  # not in those of earlier versions
        for name, kind in _KINDS.items():
            if given[name] is not None and not isinstance(given[name], kind):
                raise ValueError(f"`{name}` is {given[name]!r}")
        rows = [ClassRow(**row) for row in given["classes"]]
        known = {entry.name: given[entry.name] for entry in fields(HubIndex)}
        if known["base_classes"] is not None:
            known["base_classes"] = {int(label): str(name) for label, name in known["base_classes"].items()}
        return HubIndex(**{**known, "classes": {row.link: row for row in rows}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is damaged ({error!r}): delete it, and push again.") from error


def root_files(repo_id: str, present: set[str], index: HubIndex) -> dict[str, bytes]:
    """Return card and index of a repository with these files, after `index` is added."""
    return known_contents(repo_id, present).updated(index).files(repo_id)


def known_contents(repo_id: str, present: set[str]) -> HubIndex:
    """Return what a repository already contains: its index, and adapters that were uploaded in other ways."""
    refuse_concepts_of_repository(repo_id, present)
    folders = {name.rpartition("/")[0] for name in present if name.endswith(f"/{ADAPTER_FILES[1]}")}
    if not folders and INDEX not in present:
        return HubIndex()
    root = fetch_repository(repo_id, [INDEX, f"class_*/{ADAPTER_FILES[0]}"])
    index = read_index(root / INDEX) if INDEX in present else HubIndex()
    classes = {folder: row for folder, row in index.classes.items() if folder in folders}
    for path in adapter_folders(root):
        label = class_in_name(path.name)
        if label is not None and path.name in folders and path.name not in classes:
            name = None
            with suppress(OSError, ValueError):  # a damaged one is listed, and can be deleted, all the same
                name = class_of(read_config(path))[1]
            classes[path.name] = ClassRow(label, name or str(label), "adapter", link=path.name)
    return replace(index, classes=classes)
