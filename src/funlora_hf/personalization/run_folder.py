"""The folder of a run of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ..continual.run_folder import RunFolder
from .arguments import CONCEPT_ARGUMENTS


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
