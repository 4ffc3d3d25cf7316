"""The classes that a folder of adapters has beside the tasks of a run: what each was learned from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils import CONFIG_NAME

from ..adapters.class_folder import adapter_name, class_in_name, class_of
from ..utils.files import read_mapping, remove_folder, write_json
from .run_folder import RunFolder


class AddedClasses:
    """
    Records of classes whose adapters are added to a folder, of a run or of adapters alone. They stay in `checkpoints/added/`, so that
    an `add` that was killed can go on.
    """

    def __init__(self, folder: RunFolder) -> None:
        # What `checkpoints/seconds` holds counts for the tasks.
        self.folder = RunFolder(folder.path)
        self.folder.checkpoints = folder.checkpoints / "added"

    def begun(self) -> dict[int, dict[str, Any]]:
        """What `begin` was given, by id."""
        found = {class_in_name(path.stem): path for path in self.folder.checkpoints.glob("class_*.json")}
        return {
            class_id: read_mapping(path, keys=["class_name"])
            for class_id, path in found.items()
            if class_id is not None
        }

    def unfinished(self) -> dict[int, str]:
        """Names by ids of the classes that have begun and have no adapter yet."""
        begun = self.begun().items()
        return {c: one["class_name"] for c, one in begun if not (self.folder.adapters / adapter_name(c)).is_dir()}

    def begin(self, class_id: int, record: Mapping[str, Any]) -> None:
        """Keep what a class is learned from: JSON-able, with its "class_name".

        Its checkpoints, which may be of other images, are deleted.
        """
        place = self.folder.checkpoints / adapter_name(class_id)
        remove_folder(place)
        write_json(place.with_suffix(".json"), record)

    def finished(self) -> dict[str, dict[str, Any]]:
        """As `begun`, by id as text and with the seconds that it took, of the classes whose adapter is there."""
        found = {}
        for class_id, record in sorted(self.begun().items()):
            adapter = self.folder.adapters / adapter_name(class_id)
            # Another class of this id may have been pulled into the folder since. Other methods have no name in their config.
            if adapter.is_dir() and class_of(read_mapping(adapter / CONFIG_NAME))[1] in (None, record["class_name"]):
                times = read_mapping(self.folder.checkpoints / "seconds" / f"{adapter.name}.json", keys=["seconds"])
                found[str(class_id)] = {**record, "seconds": times["seconds"]}
        return found
