"""Recognize concepts of a text-to-image model where classes are expected, so that no command mistakes one for the other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


CONCEPT_FILE = "concept.json"
# Where a repository has them.
CONCEPT_FILES = (CONCEPT_FILE, f"*/{CONCEPT_FILE}")


class ConceptsError(ValueError):
    """There are concepts of a text-to-image model where classes were expected."""


def concept_folders(root: Path) -> list[Path]:
    """Return the folders of concepts in that of a run, of concepts or of one concept, sorted; empty if there are none."""
    return sorted(file.parent for place in ("", "*/", "concepts/*/") for file in root.glob(f"{place}{CONCEPT_FILE}"))


def refuse_concepts(source: str | os.PathLike, root: Path) -> None:
    """Raise a ConceptsError if a folder has concepts; the error calls it `source`."""
    refuse(source, [folder.name for folder in concept_folders(root)])


def refuse_concepts_of_repository(repo_id: str, present: Iterable[str]) -> None:
    """Raise a ConceptsError if a repository has concepts, by the names of its files."""
    refuse(repo_id, sorted(name.split("/")[-2] for name in present if name.endswith(f"/{CONCEPT_FILE}")))


def refuse(source: str | os.PathLike, names: Iterable[str]) -> None:
    """Raise a ConceptsError if there are names of concepts."""
    if found := ", ".join(names):
        raise ConceptsError(
            f"{os.fspath(source)!r} has concepts of a text-to-image model ({found}), expected classes: of concepts, there are `funlora info`, "
            '`verify`, `add`, `export`, `push`, `delete` and `sample --prompt "..."`; `load_concept` loads one into a pipeline.'
        )
