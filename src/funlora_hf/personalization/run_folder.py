"""The folder of a run of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..continual.added_classes import AddedPhases
from ..continual.run_folder import RunFolder
from ..hub.concept_folders import CONCEPT_FILE
from .arguments import CONCEPT_ARGUMENTS


PHASE = "concept_"
"""Start of the name of the phase that learns a concept alone."""


class ConceptFolder(RunFolder):
    """Paths of a run of concepts: each has a folder in `concepts/`; strategies with one model for all also write `model/`."""

    arguments = CONCEPT_ARGUMENTS
    learned: ClassVar[tuple[str, ...]] = ("concepts", "model")
    evaluates_again: ClassVar[bool] = False

    def _check_deletion(self, present: Sequence[str], needed: Mapping[str, str]) -> None:
        super()._check_deletion(present, needed)
        own = set(self.classes().values())
        others = sorted(one.name for one in (self.path / "concepts").glob("[!.]*") if one.name not in own)
        if others:
            raise ValueError(
                f"`overwrite_output_dir` would delete {', '.join(others)} in {self.path / 'concepts'}, which the run there has not "
                "learned: move them, or choose another `output_dir`."
            )


class AddedConcepts(AddedPhases):
    """Records of concepts that are added to a run."""

    folder: ConceptFolder

    def begun(self) -> dict[str, dict[str, Any]]:
        """Return the records by name."""
        return {one["name"]: one for one in self.records(PHASE, key="name").values()}

    def unfinished(self) -> list[str]:
        """Return the names of the concepts that have begun and are not learned yet."""
        return [name for name in self.begun() if not self._is_there(name)]

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the records of the concepts that are learned, by name, with the seconds that it took."""
        return {
            name: self.with_seconds(f"{PHASE}{name}", one)
            for name, one in self.begun().items()
            if self._is_there(name)
        }

    def _is_there(self, name: str) -> bool:
        return (self.folder.path / "concepts" / name / CONCEPT_FILE).is_file()
