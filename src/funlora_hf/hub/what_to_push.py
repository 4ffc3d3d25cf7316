"""Make the files and cards of a repository from the folders of a base, of adapters and of a run."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..adapters.base_fingerprint import base_fingerprints
from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders
from ..adapters.untrusted_adapter import SavedAdapter, read_adapter
from ..adapters.untrusted_base import GENERATOR_FOLDERS, PIPELINE, base_classes, read_unet
from ..cards.model_cards import ClassRow, Place, adapter_card, place_of
from ..utils.checks import CONFIG_FINGERPRINT, check_not_mistyped
from ..utils.files import read_json, read_mapping
from .classes_json import CARD, results_without
from .concept_folders import refuse_concepts


SAMPLES = "samples.png"
# Files of a pipeline that diffusers writes; the card is ours.
_BASE_FILES = ("*.json", "*/*.json", "*/*.safetensors", "*/*.safetensors.index.json")


@dataclass(frozen=True)
class BaseFolder:
    """A base on this machine: the folder of its pipeline, names by ids in the order of the class embedding, and `base_fingerprints`."""

    folder: Path
    classes: dict[int, str]
    fingerprints: dict[str, str]

    @property
    def tag(self) -> str:
        """Name of the tag for exactly these weights, settings and classes."""
        about = json.dumps([self.fingerprints.get(CONFIG_FINGERPRINT), list(self.classes.items())])
        return f"base-{self.fingerprints['float32'][:12]}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"

    def files(self) -> dict[str, Path | bytes]:
        """Files for the repository: JSON and safetensors, without adapters."""
        return pipeline_files(self.folder, {path for pattern in _BASE_FILES for path in self.folder.glob(pattern)})


def pipeline_files(folder: Path, paths: Iterable[Path]) -> dict[str, Path | bytes]:
    """Files of a pipeline's folder for the repository, by their names in it."""
    files: dict[str, Path | bytes] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        files[name] = path
        if path.suffix == ".json" and isinstance(settings := read_json(path), dict) and "_name_or_path" in settings:
            del settings["_name_or_path"]  # the folder that the model once came from
            files[name] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    return files


def read_base(folder: Path) -> BaseFolder:
    """Read the base in a folder.

    Raises:
        FileNotFoundError: no pipeline in it.
        ValueError: a U-Net that cannot be loaded.
    """
    if not (folder / PIPELINE).is_file():
        raise FileNotFoundError(f"{os.fspath(folder)!r} has no {PIPELINE}, expected a pipeline's folder.")
    return BaseFolder(folder, base_classes(folder), base_fingerprints(read_unet(folder)))


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on this machine, checked, the class that it is of, if it is of one, with the name, and the picture of its samples."""

    adapter: SavedAdapter
    class_label: int | None
    class_name: str
    samples: Path | None

    @property
    def base_on_hub(self) -> Place:
        """The base that its config names, if it is a repository."""
        return place_of(self.adapter.config.base_model_name_or_path, self.adapter.config.revision)

    def row(self, results: Mapping[str, Any] | None, link: str) -> ClassRow:
        """Its row in the table of classes."""
        label = cast(int, self.class_label)
        accuracy = ((results or {}).get("class_accuracy") or {}).get(str(label))
        size = (self.adapter.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        return ClassRow(label, self.class_name, "adapter", self.adapter.numel, size, accuracy, link)

    def files(
        self, place: Place, *, results: Mapping[str, Any] | None = None, license: str | None = None
    ) -> dict[str, Path | bytes]:
        """Files for the repository: config with the base's repository, weights, card and picture."""
        folder = self.adapter.folder
        settings = read_mapping(folder / CONFIG_NAME)
        settings["base_model_name_or_path"], settings["revision"] = place.base, place.base_revision
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        card = adapter_card(
            self.adapter.config,
            class_label=self.class_label,
            class_name=self.class_name,
            parameters=self.adapter.numel,
            num_bytes=weights.stat().st_size,
            place=place,
            results=results,
            samples=SAMPLES if self.samples else None,
            license=license,
        )
        files: dict[str, Path | bytes] = {
            CONFIG_NAME: json.dumps(settings, indent=2, sort_keys=True).encode(),
            SAFETENSORS_WEIGHTS_NAME: weights,
            CARD: str(card).encode(),
        }
        if self.samples:
            files[SAMPLES] = self.samples
        return {f"{place.subfolder}/{name}" if place.subfolder else name: content for name, content in files.items()}


def read_adapter_folder(folder: Path, *, samples: Path | None = None) -> AdapterFolder:
    """Read the adapter in a folder and check all its values before it is published.

    Raises:
        FileNotFoundError: no adapter in it.
        ValueError: a damaged one.
    """
    adapter = read_adapter(folder)
    adapter.tensors()
    found = adapter_class(folder)
    label = found["class_label"]
    name = found["class_name"] or ("" if label is None else str(label))
    return AdapterFolder(adapter, label, name, samples if samples and samples.is_file() else None)


@dataclass(frozen=True)
class RunToPush:
    """A run's folder: its base, unless it had one from elsewhere, adapters by id, ids of the classes of each task and of those that
    are of no task, and its results, if it has ended."""

    base: BaseFolder | None
    adapters: dict[int, AdapterFolder]
    tasks: list[list[int]]
    others: list[int]
    results: Mapping[str, Any] | None

    def results_of(self, class_label: int) -> Mapping[str, Any] | None:
        """The results that a class's card shows; for a class that was added to the run, the recipe it was added by."""
        added = ((self.results or {}).get("added") or {}).get(str(class_label))
        if added is None:
            return self.results
        recipe = added["recipe"]
        return {"dataset": added["dataset"], "seed": recipe["ContinualTrainingArguments"]["seed"], "settings": recipe}


def read_run(folder: Path, *, own_base: bool, tasks: Sequence[Sequence[int]] | None) -> RunToPush:
    """Look at the folder of a run, with the base that it has if `own_base`; tasks as in `push_all`.

    Raises:
        FileNotFoundError: no folder of a run.
        ConceptsError: a run of concepts.
        ValueError: a damaged adapter.
    """
    check_not_mistyped(f"`output_dir` is {os.fspath(folder)!r}", os.fspath(folder))
    refuse_concepts(folder, folder)
    file = folder / "results.json"
    results = read_mapping(file, keys=["tasks"]) if file.is_file() else None
    trained = next((folder / name for name in GENERATOR_FOLDERS if (folder / name).is_dir()), None)
    base = read_base(trained) if trained is not None and own_base else None
    adapters = {}
    for path in adapter_folders(folder / ADAPTERS_FOLDER):
        found = read_adapter_folder(path, samples=folder / "figures" / f"{path.name}.png")
        adapters[cast(int, found.class_label)] = found
    if base is None and not adapters:
        raise FileNotFoundError(
            f"`output_dir` {os.fspath(folder)!r} has neither base/ nor model/ nor adapters/, expected the folder of a run."
        )
    if results is not None:
        results = _results_now(results, folder, adapters)
    if tasks is None:
        tasks = (results or {}).get("tasks") or [[] if base is None else list(base.classes), list(adapters)]
    named = {label for task in tasks for label in task}
    others = [label for label in adapters if label not in named]
    return RunToPush(base, adapters, list(map(list, tasks)), others, results)


def _results_now(results: Mapping[str, Any], folder: Path, adapters: Mapping[int, AdapterFolder]) -> dict[str, Any]:
    """The results of a run that are still valid for the present contents of its folder."""
    # A class of a later task without an adapter has been deleted.
    later = {label for task in results.get("tasks", [])[1:] for label in task}
    with_adapters = bool(adapters) or (folder / ADAPTERS_FOLDER).is_dir()
    now = results_without(results, later - adapters.keys() if with_adapters else ())
    if now.get("class_accuracy"):
        # An updated class has no picture any more, and its accuracy was that of the adapter before.
        pictures = {path.stem for path in (folder / "figures").glob("class_*.png")}
        now["class_accuracy"] = {c: v for c, v in now["class_accuracy"].items() if f"class_{c}" in pictures}
    return now


def warn_without_base(adapter: str) -> None:
    """Warn that others cannot find the base of what is about to be pushed."""
    warnings.warn(
        f"{adapter} is pushed without the name of its base, which is known only by a local path: others cannot tell which base "
        "it needs. Push the base with `push_base` and pass its repository as `base_model`.",
        stacklevel=3,
    )
