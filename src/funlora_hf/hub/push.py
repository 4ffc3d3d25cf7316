"""Sharing on the Hub: a base, an adapter, a whole run; and taking a class off again.

Joins files, cards and repositories.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel

from ..adapters.base_fingerprint import base_fingerprints
from ..adapters.class_folder import adapter_name, known_class, save_adapter
from ..adapters.untrusted_adapter import ADAPTER_FILES
from ..cards.model_cards import ClassRow
from ..sampling.pipeline import FunLoraPipeline
from ..tuner import FunLoraConfig
from ..utils.checks import check_choice
from .classes_json import HubIndex, shown_results
from .repository import HubRepository
from .root_files import known_contents, root_files, root_files_without
from .what_to_push import (
    PIPELINE,
    Base,
    BaseFolder,
    RunToPush,
    read_adapter_folder,
    read_base,
    read_run,
    warn_without_base,
)


LAYOUTS = ("subfolders", "repositories")
_Files = dict[str, Path | bytes]


def push_base(
    pipeline: FunLoraPipeline | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str = "Base",
) -> CommitInfo | None:
    """
    Push a base, without adapters, in one commit that is tagged `base-<start of its fingerprint>`.

    Args:
        pipeline ([`FunLoraPipeline`], `str` or `os.PathLike`): the base, or the folder that it lies in.
        repo_id (`str`): "user/repo", made if it is not there.
        private (`bool`, *optional*): of a repository that is made now; None: as the account is set.
        license (`str`, *optional*): identifier of a licence, for the card.
        commit_message (`str`, *optional*): of the commit.

    Returns:
        `CommitInfo`, or None if the repository had all of it: then no commit is made.

    Raises:
        FileNotFoundError: a folder without a pipeline.
        HfHubHTTPError: the Hub refused; nothing can be seen there then.
    """
    if isinstance(pipeline, FunLoraPipeline):
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_pretrained(folder)
            return push_base(folder, repo_id, private=private, license=license, commit_message=commit_message)
    base = read_base(Path(pipeline))
    repository = HubRepository(repo_id, private=private)
    index = _index(Base(repository.repo_id, base.tag), base, license=license)
    done = repository.commit(
        lambda present: {**base.files(), **root_files(repository.repo_id, present, index)}, commit_message
    )
    repository.tag(base.tag)
    return done


def push_adapter(
    model: PeftModel,
    adapter_name: str,
    repo_id: str,
    *,
    subfolder: str | None = "class_<id>",
    class_label: int | None = None,
    class_name: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo | None:
    """
    Push one adapter of a model, in one commit.

    Args:
        model (`PeftModel`): holds the adapter.
        adapter_name (`str`): of the adapter in the model.
        repo_id (`str`): "user/repo", made if it is not there.
        subfolder (`str`, *optional*): where in it; `<id>` stands for the class. None: at the root of a repository of its own.
        class_label (`int`, *optional*): id of the class; None: the one in the config, or in `adapter_name` as `class_<id>`.
        class_name (`str`, *optional*): its name; None: the one in the config, or else the id as text.
        base_model (`str`, *optional*): repository of the base; None: the one in the config. With neither, this warns.
        base_revision (`str`, *optional*): branch, tag or commit of the base.
        private, license, commit_message: as in `push_base`.

    Returns:
        `CommitInfo`, or None if the repository had all of it: then no commit is made.

    Raises:
        ValueError: no such adapter, no id of a class, an adapter with numbers that are not finite.
        HfHubHTTPError: the Hub refused; nothing can be seen there then.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, expected one of: {', '.join(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    label, _ = known_class(config, adapter_name, class_label, class_name, name=adapter_name)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / f"class_{label}"
        _save_as(model, adapter_name, written, label, class_name)
        adapter = read_adapter_folder(written)
        base = _looked_at(adapter.base_on_hub if base_model is None else Base(base_model, base_revision))
        if base.repo_id is None:
            warn_without_base(adapter_name)
        repository = HubRepository(repo_id, private=private)
        where = None if subfolder is None else subfolder.replace("<id>", str(label))
        index = _index(base, None, [] if where is None else [adapter.row(None, where)], license=license)

        def files(present: set[str]) -> _Files:
            own = adapter.files(repository.repo_id, where, base, license=license)
            return own if where is None else {**own, **root_files(repository.repo_id, present, index)}

        return repository.commit(files, commit_message or f"Class {label} ({adapter.class_name})")


def push_all(
    output_dir: str | os.PathLike,
    repo_id: str,
    *,
    layout: str = "subfolders",
    base_model: str | None = None,
    base_revision: str | None = None,
    tasks: Sequence[Sequence[int]] | None = None,
    private: bool | None = None,
    license: str | None = None,
) -> list[CommitInfo]:
    """
    Push a run: its base, if it trained one, and a folder for each class that an adapter makes. One commit for a task, tagged
    `task-<number>`; what is there already is left out, so that a push that broke off is resumed by pushing again.

    Args:
        output_dir (`str` or `os.PathLike`): of the run.
        repo_id (`str`): "user/repo", made if it is not there.
        layout (`str`, *optional*, defaults to `"subfolders"`):
            "subfolders": all in this repository, each class in `class_<id>/`. "repositories": the base in this one, and each
            class in `<repo_id>-class_<id>`.
        base_model (`str`, *optional*):
            Repository of the base, if it is another one; the run's own base is not pushed then. None: this one, or what the
            adapters' configs name where the run had its base from elsewhere. With none, this warns.
        base_revision (`str`, *optional*): branch, tag or commit of `base_model`.
        tasks (sequence of sequences of `int`, *optional*): ids of the classes by task; None: those in results.json.
        private (`bool`, *optional*): of repositories that are made now; None: as the account is set.
        license (`str`, *optional*): identifier of a licence, for the cards.

    Returns:
        `list[CommitInfo]`: the commits made, in order; none if nothing has changed.

    Raises:
        FileNotFoundError: a folder without a base, a model or adapters.
        ValueError: a damaged adapter; nothing is pushed then.
        HfHubHTTPError: the Hub refused; commits before it stay.
    """
    check_choice("layout", layout, LAYOUTS)
    run = read_run(Path(output_dir), own_base=base_model is None, tasks=tasks)
    repository = HubRepository(repo_id, private=private)
    base = _base_of(run, repository.repo_id, base_model, base_revision)
    if base.repo_id is None and run.adapters:
        warn_without_base(f"{os.fspath(output_dir)!r}")
    if layout == "repositories":
        return _push_repositories(run, repository, base, license=license, private=private)
    return _push_subfolders(run, repository, base, license=license)


def delete_class_from_hub(repo_id: str, class_label: int, *, history: str = "keep") -> CommitInfo | None:
    """
    Delete the folder of a class and its line in the card from a repository, in one commit; or the class's own repository and
    that line, if it was pushed with `layout="repositories"`.

    Args:
        repo_id (`str`): of the repository, laid out as `push_all` does.
        class_label (`int`): id of the class.
        history (`str`, *optional*, defaults to `"keep"`):
            "keep": earlier commits and tags still have the class, for who asks for them. "squash": the newest commit becomes
            the only one; tags of tasks are deleted, those of bases stay.

    Returns:
        `CommitInfo`, or None if there was no such class; its history is squashed then all the same, if asked for.

    Raises:
        HfHubHTTPError: no such repository, or no right to write.
    """
    check_choice("history", history, ("keep", "squash"))
    repository = HubRepository(repo_id, create=False)
    present = repository.files()
    rows = [row for row in known_contents(repo_id, present).adapters.values() if row.class_label == class_label]
    done = None
    if rows:
        done = repository.commit(
            lambda present: root_files_without(repo_id, present, class_label),
            f"Delete class {class_label}",
            delete=[adapter_name(class_label)],
        )
    if _own_repository(repo_id, class_label) in [row.repository for row in rows]:
        HubRepository(_own_repository(repo_id, class_label), create=False).delete()
    if history == "squash":
        repository.forget_history(keep_tags=lambda tag: tag.startswith("base-"))
    return done


def _base_of(run: RunToPush, repo_id: str, base_model: str | None, base_revision: str | None) -> Base:
    if base_model is not None:
        return _looked_at(Base(base_model, base_revision))
    if run.base is not None:
        return Base(repo_id, run.base.tag)
    named = (found.base_on_hub for found in run.adapters.values())
    return _looked_at(next((base for base in named if base.repo_id), Base(None)))


def _looked_at(base: Base) -> Base:
    """With what its repository is, a pipeline or the U-Net itself."""
    if base.repo_id is None:
        return base
    return replace(base, is_unet=HubRepository(base.repo_id, create=False).is_unet(base.revision))


def _push_subfolders(
    run: RunToPush, repository: HubRepository, base: Base, *, license: str | None
) -> list[CommitInfo]:
    present = repository.files()
    # A run's base is its first task.
    waiting = [
        (number, task)
        for number, task in enumerate(run.tasks)
        if (number == 0 and run.base is not None and PIPELINE not in present)
        or any(_weights(c) not in present for c in task if c in run.adapters)
    ]
    commits = []
    for number, task in waiting:
        own = [c for c in task if c in run.adapters]
        # The last commit brings up to date whatever else has changed.
        is_last = number == waiting[-1][0]
        labels, with_base = (list(run.adapters), True) if is_last else (own, number == 0)
        names = ", ".join(f"{c} ({run.adapters[c].class_name})" for c in own)
        message = f"Task {number + 1}: " + (f"class {names}" if names else "base")
        make = partial(_subfolder_files, run, repository.repo_id, base, labels, with_base=with_base, license=license)
        commits.append(repository.commit(make, message))
        repository.tag(f"task-{number + 1}", *run.base_tags)
    if not waiting:
        make = partial(
            _subfolder_files, run, repository.repo_id, base, list(run.adapters), with_base=True, license=license
        )
        commits.append(repository.commit(make, "Update"))
    # An earlier push may have broken off between a commit and its tag.
    repository.tag(*(f"task-{number + 1}" for number in range(len(run.tasks))), *run.base_tags)
    return [commit for commit in commits if commit is not None]


def _subfolder_files(
    run: RunToPush,
    repo_id: str,
    base: Base,
    labels: Sequence[int],
    present: set[str],
    *,
    with_base: bool,
    license: str | None,
) -> _Files:
    made: _Files = run.base.files() if run.base is not None and with_base else {}
    for label in labels:
        adapter = run.adapters[label]
        made |= adapter.files(repo_id, adapter_name(label), base, results=run.results, license=license)
    shown = [label for label in run.adapters if label in labels or _weights(label) in present]
    rows = [run.adapters[label].row(run.results, adapter_name(label)) for label in shown]
    index = _index(base, run.base, rows, results=run.results, license=license)
    return made | root_files(repo_id, present, index)


def _push_repositories(
    run: RunToPush, repository: HubRepository, base: Base, *, license: str | None, private: bool | None
) -> list[CommitInfo]:
    commits = []
    rows = []

    def push_own() -> None:
        index = _index(base, run.base, rows, results=run.results, license=license)
        files = run.base.files() if run.base is not None else {}
        commits.append(
            repository.commit(
                lambda present: {**files, **root_files(repository.repo_id, present, index)},
                "Base" if not rows else "List of classes",
            )
        )
        repository.tag(*run.base_tags)

    if PIPELINE not in repository.files():
        push_own()
    for label, adapter in run.adapters.items():
        own = HubRepository(_own_repository(repository.repo_id, label), private=private)
        files = adapter.files(own.repo_id, None, base, results=run.results, license=license)
        commits.append(own.commit(lambda present, files=files: files, f"Class {label} ({adapter.class_name})"))
        rows.append(adapter.row(run.results, own.repo_id))
    push_own()
    return [commit for commit in commits if commit is not None]


def _index(
    base: Base,
    own_base: BaseFolder | None,
    rows: Sequence[ClassRow] = (),
    *,
    results: Mapping[str, Any] | None = None,
    license: str | None,
) -> HubIndex:
    return HubIndex(
        base_model=base.repo_id,
        base_revision=base.revision,
        base_classes=None if own_base is None else own_base.classes,
        base_fingerprint=None if own_base is None else own_base.fingerprints,
        adapters={row.link: row for row in rows},
        results=shown_results(results),
        license=license,
    )


def _own_repository(repo_id: str, class_label: int) -> str:
    """Where a class is in the layout "repositories"."""
    return f"{repo_id}-{adapter_name(class_label)}"


def _weights(class_label: int) -> str:
    return f"{adapter_name(class_label)}/{ADAPTER_FILES[1]}"


def _save_as(model: PeftModel, name: str, folder: Path, label: int, class_name: str | None) -> None:
    """Write an adapter as that of a class; FunLoRA's with the fingerprint of the base that it is on."""
    config = model.peft_config[name]
    if not isinstance(config, FunLoraConfig):
        save_adapter(model, name, folder, class_label=label, class_name=class_name)
        return
    before = config.class_label, config.class_name, config.base_fingerprint
    config.class_label, config.class_name = label, class_name or config.class_name
    config.base_fingerprint = config.base_fingerprint or base_fingerprints(model)
    try:
        save_adapter(model, name, folder)
    finally:
        config.class_label, config.class_name, config.base_fingerprint = before
