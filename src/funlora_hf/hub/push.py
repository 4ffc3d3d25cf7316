"""Push a base, an adapter or a whole run to the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from ..adapters.class_folder import adapter_configs, adapter_name, class_of, save_adapter
from ..adapters.untrusted_adapter import ADAPTER_FILES
from ..adapters.untrusted_base import PIPELINE
from ..cards.model_cards import Place, component_class
from ..sampling.pipeline import FunLoraPipeline
from .classes_json import HubIndex, root_files, shown_results
from .repository import HubRepository
from .what_to_push import RunToPush, read_adapter_folder, read_base, read_run, warn_without_base


_Files = dict[str, Path | bytes]


def push_base(
    pipeline: FunLoraPipeline | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str = "Base",
) -> CommitInfo | None:
    """Push a base, without adapters, in one commit with the tag `base-<start of its fingerprint>-<hash of settings and classes>`.

    Args:
        pipeline ([`FunLoraPipeline`], `str` or `os.PathLike`): the base, or its folder.
        repo_id (`str`): "user/repo", created if it does not exist.
        private (`bool`, *optional*): visibility of a new repository; None: the account's default.
        license (`str`, *optional*): identifier of a licence, for the card.
        commit_message (`str`, *optional*): message of the commit.

    Returns:
        `CommitInfo`, or None if nothing has changed: then no commit is made.

    Raises:
        FileNotFoundError: a folder without a pipeline.
        HfHubHTTPError: the Hub refused; then nothing of the base is visible there.
    """
    if isinstance(pipeline, FunLoraPipeline):
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_pretrained(folder)
            return push_base(folder, repo_id, private=private, license=license, commit_message=commit_message)
    base = read_base(Path(pipeline))
    repository = HubRepository(repo_id, private=private)
    index = HubIndex(
        base_model=repository.repo_id,
        base_revision=base.tag,
        base_is_unet=False,
        base_classes=base.classes,
        base_fingerprint=base.fingerprints,
        license=license,
    )
    done = repository.commit(
        lambda present: {**base.files(), **root_files(repository.repo_id, present, index)}, commit_message
    )
    repository.tag(base.tag)
    return done


def push_adapter(
    model: nn.Module,
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
    """Push one adapter of a model, in one commit.

    Args:
        model (`torch.nn.Module`): holds the adapter, as for [`save_adapter`].
        adapter_name (`str`): of the adapter in the model.
        subfolder (`str`, *optional*): Where in it; `<id>` stands for the class. None: at the root of a repository of its own,
            where an adapter needs no class.
        class_label (`int`, *optional*): id of the class; None: the one in the config, or in `adapter_name` as `class_<id>`.
        class_name (`str`, *optional*): its name; None: the one in the config, or else the id as text.
        base_model (`str`, *optional*): repository of the base; None: the one in the config. With neither, this warns.
        base_revision (`str`, *optional*): branch, tag or commit of the base.
        repo_id, private, license, commit_message: as in `push_base`.

    Returns:
        `CommitInfo`, or None if the repository had all of it: then no commit is made.

    Raises:
        ValueError: no such adapter, no id of a class, an adapter with numbers that are not finite.
        HfHubHTTPError: the Hub refused; nothing of it is visible there.
    """
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, expected one of: {', '.join(configs) or 'none'}.")
    label = class_of(configs[adapter_name], adapter_name)[0] if class_label is None else class_label
    if label is None and subfolder is not None:
        raise ValueError(
            f"The adapter {adapter_name!r} does not say which class it is: pass `class_label`, or `subfolder=None` if it is of no "
            "class."
        )
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / ("adapter" if label is None else f"class_{label}")
        save_adapter(model, written, adapter_name, class_label=label, class_name=class_name)
        adapter = read_adapter_folder(written)
        base = _looked_at(
            adapter.base_on_hub if base_model is None else Place(base=base_model, base_revision=base_revision)
        )
        if base.base is None:
            warn_without_base(adapter_name)
        repository = HubRepository(repo_id, private=private)
        where = None if subfolder is None else subfolder.replace("<id>", str(label))
        index = HubIndex(
            base_model=base.base,
            base_revision=base.base_revision,
            base_is_unet=_is_unet(base),
            base_class=component_class(adapter.adapter.config),
            classes={} if where is None else {where: adapter.row(None, where)},
            license=license,
        )

        def files(present: set[str]) -> _Files:
            own = adapter.files(replace(base, source=repository.repo_id, subfolder=where), license=license)
            return own if where is None else {**own, **root_files(repository.repo_id, present, index)}

        message = "Adapter" if label is None else f"Class {label} ({adapter.class_name})"
        return repository.commit(files, commit_message or message)


def push_all(
    output_dir: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    tasks: Sequence[Sequence[int]] | None = None,
    private: bool | None = None,
    license: str | None = None,
) -> list[CommitInfo]:
    """Push a run: its base, if it trained one, and a folder `class_<id>/` for each class that an adapter makes.

    Each task is one commit with the tag `task-<number>`; classes of no task are another one, without a tag. What is there already is
    left out: push again to resume.

    Args:
        output_dir (`str` or `os.PathLike`): of the run.
        base_model (`str`, *optional*): Repository of the base, if it is another one; the run's own base is not pushed then.
            None: this one, or what the adapters' configs name where the run had its base from elsewhere. With none, this
            warns.
        base_revision (`str`, *optional*): branch, tag or commit of `base_model`.
        tasks (sequence of sequences of `int`, *optional*): ids of the classes by task; None: those in results.json.
        repo_id, private, license: as in `push_base`.

    Returns:
        `list[CommitInfo]`: the commits made, in order; none if nothing has changed.

    Raises:
        FileNotFoundError: a folder without a base, a model or adapters.
        ValueError: a damaged adapter; nothing is pushed then.
        HfHubHTTPError: the Hub refused; commits before it stay.
    """
    run = read_run(Path(output_dir), own_base=base_model is None, tasks=tasks)
    repository = HubRepository(repo_id, private=private)
    base = _base_of(run, repository.repo_id, base_model, base_revision)
    if base.base is None and run.adapters:
        warn_without_base(f"{os.fspath(output_dir)!r}")
    base_tags = [] if run.base is None else [run.base.tag]

    def files(labels: Collection[int], with_base: bool, present: set[str]) -> _Files:
        made: _Files = run.base.files() if run.base is not None and with_base else {}
        for label in labels:
            place = replace(base, source=repository.repo_id, subfolder=adapter_name(label))
            made |= run.adapters[label].files(place, results=run.results_of(label), license=license)
        shown = {c: adapter_name(c) for c in run.adapters if c in labels or _weights(c) in present}
        index = HubIndex(
            base_model=base.base,
            base_revision=base.base_revision,
            base_is_unet=_is_unet(base),
            base_classes=None if run.base is None else run.base.classes,
            base_fingerprint=None if run.base is None else run.base.fingerprints,
            classes={name: run.adapters[label].row(run.results, name) for label, name in shown.items()},
            results=shown_results(run.results),
            license=license,
        )
        return made | root_files(repository.repo_id, present, index)

    present = repository.files()
    # A run's base is its first task.
    parts: list[tuple[int | None, list[int]]] = [*enumerate(run.tasks, start=1), (None, run.others)]
    waiting = [
        (number, task)
        for number, task in parts
        if (number == 1 and run.base is not None and PIPELINE not in present)
        or any(_weights(c) not in present for c in task if c in run.adapters)
    ]
    commits = []
    for number, task in waiting or [(None, [])]:
        own = [c for c in task if c in run.adapters]
        names = ", ".join(f"{c} ({run.adapters[c].class_name})" for c in own)
        part = "Added" if number is None else f"Task {number}"
        message = f"{part}: " + (f"class {names}" if names else "base") if waiting else "Update"
        # The last commit also updates everything else that has changed.
        is_last = not waiting or number == waiting[-1][0]
        made = partial(files, run.adapters if is_last else own, is_last or number == 1)
        commits.append(repository.commit(made, message))
        repository.tag(*([] if number is None else [f"task-{number}"]), *base_tags)
    # An earlier push may have stopped between a commit and its tag.
    repository.tag(*(f"task-{number}" for number in range(1, len(run.tasks) + 1)), *base_tags)
    return [done for done in commits if done is not None]


def _base_of(run: RunToPush, repo_id: str, base_model: str | None, base_revision: str | None) -> Place:
    if base_model is not None:
        return _looked_at(Place(base=base_model, base_revision=base_revision))
    if run.base is not None:
        return Place(base=repo_id, base_revision=run.base.tag)
    named = (found.base_on_hub for found in run.adapters.values())
    return _looked_at(next((place for place in named if place.base), Place()))


def _looked_at(base: Place) -> Place:
    """Add whether its repository is a U-Net by itself, and no pipeline; False also if that cannot be found out."""
    files: set[str] = set()
    if base.base is not None:
        with suppress(HfHubHTTPError):
            files = HubRepository(base.base, create=False).files(base.base_revision)
    return replace(base, base_is_unet="config.json" in files and PIPELINE not in files)


def _is_unet(base: Place) -> bool | None:
    return None if base.base is None else base.base_is_unet


def _weights(class_label: int) -> str:
    return f"{adapter_name(class_label)}/{ADAPTER_FILES[1]}"
