"""Delete a class from a pipeline, a bank, a folder and a repository."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file

from ..adapters.bank import AdapterBank
from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_folders, adapter_name, class_in_name
from ..adapters.untrusted_adapter import fetch_repository, read_config
from ..adapters.untrusted_base import PIPELINE, base_classes
from ..sampling.pipeline import FunLoraPipeline
from ..utils.checks import check_choice
from ..utils.files import delete, read_mapping, read_tensors, refuse_links, whole_file, write_json
from ..utils.locks import folder_lock
from .classes_json import INDEX, known_contents
from .repository import HubRepository


def delete_class(
    class_label: int,
    *,
    pipeline: FunLoraPipeline | None = None,
    bank: AdapterBank | None = None,
    output_dir: str | os.PathLike | None = None,
    repo_id: str | None = None,
    history: str = "keep",
) -> list[str]:
    """Delete the class of an adapter from the given places. No other class changes.

    The repository comes first: if the Hub refuses, nothing has been deleted. Places without the class are skipped. A warning names the
    classes in the folder and in the repository whose adapters started from the deleted one, and how to train them from a cold start.

    Args:
        class_label (`int`): id of the class.
        pipeline ([`FunLoraPipeline`], *optional*): unload the class; its parameters in the model become zeros.
        bank ([`AdapterBank`], *optional*): remove the class; save a file of the bank again afterwards.
        output_dir (`str` or `os.PathLike`, *optional*): Folder of a run or of a saved pipeline: delete the adapter, its
            checkpoints, the pictures that show the class, and its entry under `added` in results.json. The measurements in
            results.json stay. If the run has not ended, it will learn the class again when it is resumed.
        repo_id (`str`, *optional*): repository with the layout of `push_all`.
        history (`str`, *optional*, defaults to `"keep"`): history of the repository, see `delete_class_from_hub`.

    Returns:
        `list[str]`: the places that had the class: "repo_id", "pipeline", "bank", "output_dir".

    Raises:
        FileNotFoundError: there is no folder `output_dir`.
        ValueError: a class of the base, which is part of its weights; a class that none of the places has; or a link in
            `output_dir`.
        FolderInUseError: a run uses `output_dir`.
        HfHubHTTPError: the Hub refused; then nothing has been deleted.
    """
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"`output_dir` is {os.fspath(folder)!r}, but there is no such folder: name the folder of a run or of a saved pipeline."
        )
    of_bases = set() if pipeline is None else set(pipeline.base_classes)
    for place in () if folder is None else (folder, folder / "base"):
        if (place / PIPELINE).is_file():
            of_bases |= base_classes(place).keys()
    if class_label in of_bases:
        raise ValueError(
            f"`class_label` is {class_label}, a class of the base, expected a class of an adapter: the classes of the base are "
            "part of its weights and cannot be deleted."
        )
    with ExitStack() as held:
        traces: list[Path] = []
        if folder is not None:
            held.enter_context(folder_lock(folder))
            traces = _traces(folder, class_label)
        found = []
        if repo_id is not None and delete_class_from_hub(repo_id, class_label, history=history) is not None:
            found.append("repo_id")
        if pipeline is not None and class_label in pipeline.classes:
            pipeline.unload_adapter(class_label)
            found.append("pipeline")
        if bank is not None and class_label in bank:
            bank.remove(class_label)
            found.append("bank")
        if folder is not None and _delete_from_folder(folder, class_label, traces):
            found.append("output_dir")
            _warn_of_starts(class_label, folder / ADAPTERS_FOLDER, os.fspath(folder))
        if not found:
            raise ValueError(
                f"`class_label` is {class_label}, which none of the given places has: name a class of an adapter, and where it "
                "is (`output_dir`, `repo_id`)."
            )
        return found


def delete_class_from_hub(repo_id: str, class_label: int, *, history: str = "keep") -> CommitInfo | None:
    """Delete the folder of a class and its line in the card from a repository, in one commit.

    Args:
        repo_id (`str`): repository with the layout of `push_all`.
        class_label (`int`): id of the class.
        history (`str`, *optional*, defaults to `"keep"`): "keep": earlier commits and tags still have the class. "squash": a
            single commit replaces the history; tags of tasks are deleted, those of bases stay.

    Returns:
        `CommitInfo`, or None if there was no such class. "squash" squashes the history in both cases.

    Raises:
        HfHubHTTPError: no such repository, or no permission to write.
    """
    check_choice("history", history, ("keep", "squash"))
    repository = HubRepository(repo_id, create=False)
    contents = known_contents(repo_id, repository.files())
    folders = [folder for folder, row in contents.classes.items() if row.class_label == class_label]
    done = None
    if folders:
        # From the same commit as the adapter to delete.
        root = fetch_repository(repo_id, [f"class_*/{CONFIG_NAME}"])
        done = repository.commit(
            # A card without an index is not ours.
            lambda present: (
                known_contents(repo_id, present).without(class_label).files(repo_id) if INDEX in present else {}
            ),
            f"Delete class {class_label}",
            delete=folders,
        )
        _warn_of_starts(class_label, root, repo_id)
    if history == "squash":
        repository.forget_history(keep_tags=lambda tag: tag.startswith("base-"))
    return done


def _warn_of_starts(class_label: int, adapters: Path, place: str) -> None:
    """Warn of adapters in a folder that started from the adapter of a deleted class, or from others that did."""
    starts: dict[str, set[str]] = {}
    for folder in adapter_folders(adapters):
        with suppress(OSError, ValueError):  # a damaged one can start nothing
            starts[folder.name] = set(getattr(read_config(folder), "started_from", None) or ())
    own = adapter_name(class_label)
    depending = {own}
    while more := {name for name, names in starts.items() if names & depending} - depending:
        depending |= more
    if names := [name for name in starts if name in depending - {own}]:
        warnings.warn(
            f"{place}: {', '.join(names)} started from the deleted {own} and still depend on it. To train one of them from a cold start: "
            f"`funlora train --output_dir RUN --update_class {class_in_name(names[0])} --update_mode cold`, with its dataset and settings.",
            stacklevel=3,
        )


def _traces(folder: Path, class_label: int) -> list[Path]:
    """Files and folders of the class in a folder. Raises a ValueError, before anything is deleted, if one of them is a link."""
    name = adapter_name(class_label)
    traces = [folder / ADAPTERS_FOLDER / name, folder / "figures" / f"{name}.png", *_grids_with(folder, class_label)]
    traces += [path for path in (folder / "checkpoints").rglob(f"{name}*") if path.stem == name]
    refuse_links(traces)
    return traces


def _delete_from_folder(folder: Path, class_label: int, traces: list[Path]) -> bool:
    name = adapter_name(class_label)
    had_it = (folder / ADAPTERS_FOLDER / name).is_dir()
    figures = folder / "figures" / "samples.safetensors"
    if figures.is_file():  # the first samples of all classes
        samples = read_tensors(figures, remedy="delete it; it only shows samples, and nothing else needs it")
        with whole_file(figures) as temporary:
            save_file({key: images for key, images in samples.items() if key.rpartition("/")[2] != name}, temporary)
    results = folder / "results.json"
    if str(class_label) in (added := _added(results)):
        others = {key: one for key, one in added.items() if key != str(class_label)}
        write_json(results, {**read_mapping(results), "added": others})
    delete(traces)
    return had_it


def _added(results: Path) -> dict[str, Any]:
    """Records of classes that `funlora add` added to a run, by id as text."""
    return read_mapping(results).get("added", {}) if results.is_file() else {}


def _grids_with(folder: Path, class_label: int) -> list[Path]:
    """Pictures of all classes that show this one: those of its task and later; all if its task is not known; none if it was added
    after the run."""
    results = folder / "results.json"
    if str(class_label) in _added(results):
        return []
    tasks = read_mapping(results, keys=["tasks"])["tasks"] if results.is_file() else []
    first = next((number for number, task in enumerate(tasks, start=1) if class_label in task), 1)
    grids = (folder / "figures").glob("samples_task_*.png")
    return [path for path in grids if int(path.stem.rpartition("_")[2]) >= first]
