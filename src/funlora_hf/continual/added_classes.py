"""Records of the classes added beside the tasks of a run: the images and the settings that each was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils import CONFIG_NAME

from ..adapters.class_folder import adapter_name, class_in_name, class_of
from ..utils.files import read_mapping, remove_folder, write_json
from .run_folder import RunFolder


class AddedClasses:
    """
    Records of classes whose adapters are added to a folder, that of a run or one of adapters alone. They are kept in
    `checkpoints/added/`, so that an `add` that was killed can go on.
    """

    def __init__(self, folder: RunFolder) -> None:
        # Not in `checkpoints/` itself, whose `seconds/` count for the tasks.
        self.folder = RunFolder(folder.path)
        self.folder.checkpoints = folder.checkpoints / "added"

    def begun(self) -> dict[int, dict[str, Any]]:
        """Return the records that `begin` was given, by id."""
        found = {class_in_name(path.stem): path for path in self.folder.checkpoints.glob("class_*.json")}
        return {
            class_id: read_mapping(path, keys=["class_name"])
            for class_id, path in found.items()
            if class_id is not None
        }

    def unfinished(self) -> dict[int, str]:
        """Return id -> name of the classes that have begun and have no adapter yet."""
        begun = self.begun().items()
        return {c: one["class_name"] for c, one in begun if not (self.folder.adapters / adapter_name(c)).is_dir()}

    def begin(self, class_id: int, record: Mapping[str, Any]) -> None:
        """Keep the record of a class: JSON-able, with its "class_name".

        Delete its checkpoints, which may come from other images.
        """
        place = self.folder.checkpoints / adapter_name(class_id)
        remove_folder(place)
        write_json(place.with_suffix(".json"), record)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the records of the classes whose adapter exists, by id as text, with the seconds that it took."""
        found = {}
        for class_id, record in sorted(self.begun().items()):
            adapter = self.folder.adapters / adapter_name(class_id)
            # Another class of this id may have been pulled into the folder since. Configs of other methods have no name.
            if adapter.is_dir() and class_of(read_mapping(adapter / CONFIG_NAME))[1] in (None, record["class_name"]):
                times = read_mapping(self.folder.checkpoints / "seconds" / f"{adapter.name}.json", keys=["seconds"])
                found[str(class_id)] = {**record, "seconds": times["seconds"]}
        return found
