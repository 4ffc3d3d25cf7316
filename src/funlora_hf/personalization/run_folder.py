"""The folder of a run of concepts."""

from __future__ import annotations

from typing import ClassVar

from ..continual.run_folder import RunFolder
from .arguments import CONCEPT_ARGUMENTS


class ConceptFolder(RunFolder):
    """Paths of a run of concepts: each has a folder in `concepts/`; strategies with one model for all also write `model/`."""

    arguments = CONCEPT_ARGUMENTS
    learned: ClassVar[tuple[str, ...]] = ("concepts", "model")
