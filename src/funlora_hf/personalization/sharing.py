"""Push concepts to the Hub, and delete them from a run and from the Hub."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from peft.utils import CONFIG_NAME

from ..adapters.untrusted_adapter import fetch_repository
from ..cards.model_cards import Place, concepts_card
from ..continual.publishing import Publisher
from ..data.tasks import Task
from ..hub.classes_json import INDEX
from ..hub.concept_folders import CONCEPT_FILE, CONCEPT_FILES
from ..hub.repository import HubRepository
from ..hub.what_to_push import pipeline_files, warn_without_base
from ..utils.checks import check_choice
from ..utils.files import delete, read_mapping, refuse_links, write_json
from ..utils.locks import folder_lock
from .concept_folder import CARD, ConceptRecord, SavedConcept, parse_record
from .found_concepts import check_weights, find_concepts
from .strategies.base import ConceptStrategy


Files = dict[str, Path | bytes]
RESULTS = "results.json"


def push_concepts(
    output_dir: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    tasks: Sequence[Sequence[str]] | None = None,
    private: bool | None = None,
    license: str | None = None,
) -> list[CommitInfo]:
    """Push the concepts of a run in one commit, a folder `<name>/` for each; if they are learned into its own pipeline, that, too.

    Args:
        output_dir: folder of the run, or of one concept.
        repo_id: "user/repo", created if it does not exist. Other concepts in it stay.
        base_model: repository of the base; None: the one that the run was given, if it is a repository.
        base_revision: branch, tag or commit of `base_model`.
        tasks: names of the concepts to push, by task; the commit gets the last task's tag, `task-<number>`. None: all concepts.
        private: visibility of a new repository; None: the account's default.
        license: identifier of a licence, for the cards; None: that of the card in the repository, if there is one.

    Returns:
        The commit; empty if nothing has changed.

    Raises:
        FileNotFoundError: no such folder, or no concept in it.
        ValueError: a damaged concept, a repository of classes, or one of concepts with a pipeline of their own; nothing is pushed.
        HfHubHTTPError: the Hub refused; nothing is visible there.
    """
    found = find_concepts(output_dir)
    names = None if tasks is None else {name for task in tasks for name in task}
    concepts = [one for one in found.saved() if names is None or one.record.name in names]
    for one in concepts:
        try:
            check_weights(one)
        except ValueError as error:
            raise ValueError(f"The concept {found.name(one.folder)} is not pushed: {error}") from error
    in_model = [one.record.name for one in concepts if one.record.in_model]
    pipeline: Files = {}
    if in_model:
        model = Path(found.model())
        pipeline = pipeline_files(model, (path for path in model.rglob("*") if path.is_file() and path.name != CARD))
        if taken := sorted({name.partition("/")[0] for name in pipeline} & {one.record.name for one in concepts}):
            raise ValueError(
                f"The concept {', '.join(taken)} has the name of a part of the pipeline: give it another name."
            )
    repository = HubRepository(repo_id, private=private)

    def place(concept: SavedConcept) -> Place:
        base = concept.place if base_model is None else Place(base=base_model, base_revision=base_revision)
        return Place(repository.repo_id, concept.record.name, base.base, base.base_revision)

    if any(place(one).base is None and not one.record.is_tiny and not one.record.in_model for one in concepts):
        warn_without_base(f"{os.fspath(output_dir)!r}")

    def files(present: set[str]) -> Files:
        if INDEX in present:
            raise ValueError(
                f"`repo_id` is {repository.repo_id!r}, which has classes: push concepts to another repository."
            )
        records = _records(repository.repo_id, present)
        own = {one.record.name: one.record.published(place(one)) for one in concepts}
        others = [record for name, record in records.items() if name not in own]
        if others and (in_model or any(record.in_model for record in others)):
            raise ValueError(
                f"`repo_id` is {repository.repo_id!r}, which has {', '.join(record.name for record in others)} of another run; concepts that "
                "are learned into the run's own pipeline need a repository of their own."
            )
        stated = license or _license(repository.repo_id, present)
        made = dict(pipeline)
        for one in concepts:
            made |= {
                f"{one.record.name}/{name}": content
                for name, content in _folder_files(one, place(one), stated).items()
            }
        return made | _root({**records, **own}, repository.repo_id, stated)

    shown = [one.record.name for one in concepts] if tasks is None else tasks[-1]
    message = f"oncept{'s' * (len(shown) > 1)} {', '.join(shown)}"
    done = repository.commit(files, f"C{message}" if tasks is None else f"Task {len(tasks)}: c{message}")
    if tasks is not None:
        repository.tag(f"task-{len(tasks)}")
    return [] if done is None else [done]


class ConceptPublisher(Publisher):
    """Pushes a run of concepts while it learns; one with a pipeline of its own at the end, when it writes that."""

    def __init__(self, strategy: ConceptStrategy) -> None:
        super().__init__(strategy.setting.training, strategy.setting.tasks)
        self._strategy = strategy

    def end_task(self, task: Task) -> None:
        if not self._strategy.in_model:
            super().end_task(task)

    def commits(self, tasks: Sequence[Task]) -> list[CommitInfo]:
        names = [[self._strategy.setting.class_names[class_id] for class_id in task.class_ids] for task in tasks]
        return push_concepts(self.output_dir, self.repo_id, tasks=names, license=self.license)


def delete_concept(
    name: str, *, output_dir: str | os.PathLike | None = None, repo_id: str | None = None, history: str = "keep"
) -> list[str]:
    """Delete a concept from the given places; no other concept changes. Places without it are skipped, the repository comes first.

    Args:
        name: of the concept.
        output_dir: folder of a run: delete the concept's folder, its checkpoints and measurements, the pictures that show it, and its
            entry under `added` in results.json, whose measurements stay. If the run has not ended, it will learn the concept
            again when it is resumed, unless it was added.
        repo_id: repository with the layout of `push_concepts`.
        history: "keep": earlier commits of the repository still have the concept; "squash": a single commit replaces the history.

    Returns:
        The places that had it: "repo_id", "output_dir".

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a concept that is learned into the pipeline of all, one that none of the places has, or a link in `output_dir`.
        FolderInUseError: a run uses `output_dir`.
        HfHubHTTPError: the Hub refused; then nothing has been deleted.
    """
    check_choice("history", history, ("keep", "squash"))
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"`output_dir` is {os.fspath(folder)!r}, but there is no such folder: name the folder of a run."
        )
    with nullcontext() if folder is None else folder_lock(folder):
        own = [] if folder is None else [one.parent.name for one in sorted(folder.glob(f"concepts/*/{CONCEPT_FILE}"))]
        if folder and name in own and any((folder / part).exists() for part in ("model", "checkpoints/model_changes")):
            raise ValueError(_in_pipeline(name, os.fspath(folder)))
        traces = _traces(folder, name) if folder is not None and name in own else []
        repository = None if repo_id is None else HubRepository(repo_id, create=False)
        on_hub = {} if repository is None else _records(repository.repo_id, repository.files())
        if name in on_hub and on_hub[name].in_model:
            raise ValueError(_in_pipeline(name, str(repo_id)))
        if name not in (*own, *on_hub):
            there = ", ".join(sorted({*own, *on_hub})) or "none"
            raise ValueError(f"`name` is {name!r}, expected a concept that is there: {there}.")
        places = []
        if repository is not None and name in on_hub:
            without = partial(_root_without, name, repository.repo_id)
            repository.commit(without, f"Delete concept {name}", delete=[name])
            places.append("repo_id")
        if repository is not None and history == "squash":
            repository.forget_history(keep_tags=lambda _: False)
        results = _results(folder) if folder is not None and name in own else {}
        if folder is not None and name in (added := results.get("added", {})):
            others = {key: one for key, one in added.items() if key != name}
            write_json(folder / RESULTS, {**results, "added": others})
        delete(traces)
        return [*places, *(["output_dir"] if name in own else [])]


def _folder_files(concept: SavedConcept, place: Place, license: str | None) -> Files:
    """The files of a concept's folder, without local paths."""
    files: Files = {name: concept.folder / name for name in concept.record.weights}
    files[CONCEPT_FILE] = _json(asdict(concept.record.published(place)))
    files[CARD] = concept.card(place, license=license)
    if concept.record.has_adapter:
        config = read_mapping(concept.folder / CONFIG_NAME)
        config["base_model_name_or_path"], config["revision"] = place.base, place.base_revision
        files[CONFIG_NAME] = _json(config)
    return files


def _root(records: Mapping[str, ConceptRecord], repo_id: str, license: str | None) -> Files:
    """The card of a repository with these concepts."""
    ordered = [records[name] for name in sorted(records)]
    place = Place(source=repo_id)
    if ordered:
        place = replace(place, base=ordered[0].base_model_name_or_path, base_revision=ordered[0].revision)
    is_tiny = bool(ordered) and ordered[0].is_tiny
    card = concepts_card([asdict(one) for one in ordered], is_tiny=is_tiny, place=place, license=license)
    return {CARD: str(card).encode()}


def _root_without(name: str, repo_id: str, present: set[str]) -> Files:
    records = {key: one for key, one in _records(repo_id, present).items() if key != name}
    return _root(records, repo_id, _license(repo_id, present))


def _license(repo_id: str, present: set[str]) -> str | None:
    """The licence in a repository's card."""
    if CARD not in present:
        return None
    return ModelCard.load(fetch_repository(repo_id, [CARD]) / CARD).data.get("license")


def _records(repo_id: str, present: set[str]) -> dict[str, ConceptRecord]:
    """What a repository says of its concepts, by folder; a damaged one is left out, with a warning."""
    if not any(name.endswith(f"/{CONCEPT_FILE}") for name in present):
        return {}
    records = {}
    for file in sorted(fetch_repository(repo_id, CONCEPT_FILES).glob(f"*/{CONCEPT_FILE}")):
        try:
            records[file.parent.name] = parse_record(file)
        except ValueError as error:
            warnings.warn(f"{repo_id}: {file.parent.name} is left out of the card: {error}", stacklevel=2)
    return records


def _results(folder: Path) -> dict[str, Any]:
    """Contents of results.json in a run's folder; empty before its end."""
    return read_mapping(folder / RESULTS) if (folder / RESULTS).is_file() else {}


def _traces(folder: Path, name: str) -> list[Path]:
    """Files and folders of a concept in a run's folder. Raises a ValueError if one of them is a link."""
    results = _results(folder)
    order = results.get("concepts", [])
    first = order.index(name) + 1 if name in order else 1
    # None shows a concept that was added after the run.
    grids = [] if name in results.get("added", {}) else (folder / "figures").glob("samples_task_*.png")
    traces = [folder / "concepts" / name, *(grid for grid in grids if int(grid.stem.rpartition("_")[2]) >= first)]
    own = {name: "checkpoints/evaluation", f"concept_{name}": "checkpoints"}
    traces += [path for stem, place in own.items() for path in (folder / place).rglob(f"{stem}*") if path.stem == stem]
    refuse_links(traces)
    return traces


def _in_pipeline(name: str, place: str) -> str:
    return (
        f"`name` is {name!r}, which {place} has in the weights of its pipeline, as all its concepts: it cannot be deleted alone. Learn the "
        "others again, without it."
    )


def _json(contents: Mapping[str, object]) -> bytes:
    return (json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()
