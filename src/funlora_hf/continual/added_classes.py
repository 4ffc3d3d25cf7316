"""Records of what is added beside the tasks of a run: the images and the settings that each addition was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..adapters.class_folder import adapter_name, class_in_name, class_of
from ..utils.files import read_mapping, remove_folder, write_json
from .run_folder import RunFolder


class AddedPhases:
    """Records of phases that are trained beside the tasks of a run. They are kept in `checkpoints/added/`, so that an `add` that
    was killed can go on.

    Args:
        folder: of the run, or of adapters alone.
    """

    def __init__(self, folder: RunFolder) -> None:
        # Not in `checkpoints/` itself, whose `seconds/` count for the tasks.
        self.folder = type(folder)(folder.path)
        self.folder.checkpoints = folder.checkpoints / "added"

    def records(self, start: str, *, key: str) -> dict[str, dict[str, Any]]:
        """Return the records that `keep` was given, by phase, of phases whose name starts so; each has the key."""
        files = sorted(self.folder.checkpoints.glob(f"{start}*.json"))
        return {path.stem: read_mapping(path, keys=[key]) for path in files}

    def keep(self, phase: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a phase, JSON-able.

        Delete its checkpoints, which may come from other images.
        """
        place = self.folder.checkpoints / phase
        remove_folder(place)
        write_json(Path(f"{place}.json"), record)

    def with_seconds(self, phase: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a finished phase with the seconds that it took."""
        times = read_mapping(self.folder.checkpoints / "seconds" / f"{phase}.json", keys=["seconds"])
        return {**record, "seconds": times["seconds"]}


class AddedClasses(AddedPhases):
    """Records of classes whose adapters are added to a folder, that of a run or one of adapters alone."""

    def begun(self) -> dict[int, dict[str, Any]]:
        """Return the records of classes that `keep` was given, by id."""
        records = {class_in_name(name): record for name, record in self.records("class_", key="class_name").items()}
        return {class_id: record for class_id, record in records.items() if class_id is not None}

    def unfinished(self) -> dict[int, str]:
        """Return id -> name of the classes that have begun and have no adapter yet."""
        begun = self.begun().items()
        return {c: one["class_name"] for c, one in begun if not (self.folder.adapters / adapter_name(c)).is_dir()}

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the records of the classes whose adapter exists, by id as text, with the seconds that it took."""
        found = {}
        for class_id, record in sorted(self.begun().items()):
            adapter = self.folder.adapters / adapter_name(class_id)
            # Another class of this id may have been pulled into the folder since. Configs of other methods have no name.
            if adapter.is_dir() and class_of(read_mapping(adapter / CONFIG_NAME))[1] in (None, record["class_name"]):
                found[str(class_id)] = self.with_seconds(adapter.name, record)
        return found
