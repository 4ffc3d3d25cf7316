"""Add classes to a run, a base, or a repository on the Hub: the command `funlora add`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from transformers import HfArgumentParser

from .adapters.base_fingerprint import FingerprintCheck
from .adapters.class_folder import adapter_folders, adapter_name, class_in_name
from .adapters.untrusted_adapter import method, read_config
from .adapters.untrusted_bank import read_bank
from .adapters.untrusted_base import PIPELINE, read_unet
from .continual.added_classes import AddedClasses
from .continual.base import ExistingBase, find_base
from .continual.config import (
    LATEST,
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    run_settings,
)
from .continual.run_context import ended, held
from .continual.run_folder import RunFolder, differences, told
from .continual.strategies.funlora import FunLora
from .continual.strategies.registry import strategy_class
from .continual.strategy import PhaseSettings
from .continual.termination import Termination
from .continual.trainer import phase_steps
from .data.class_ids import assign_class_ids
from .data.image_data import ImageClassificationData
from .data.tasks import Task
from .hub.concept_folders import refuse_concepts
from .hub.find import Contents, find_contents
from .run import Run, RunArguments
from .train import take_recipe
from .utils.arguments import as_options, refuse_unknown, some_fields, tidy_help
from .utils.checks import check_class_name, check_not_mistyped, expanded
from .utils.files import read_mapping, recover_folder, write_json


logger = logging.getLogger(__name__)

# Arguments of a run that change the trained adapter.
_RECIPE: dict[type, tuple[str, ...]] = {
    DataArguments: ("random_flip",),
    ModelArguments: (
        "peft_method",
        "function",
        "num_functions",
        "train_omega",
        "operation",
        "rank",
        "ratio",
        "target_modules",
    ),
    ContinualTrainingArguments: (
        "strategy",
        "seed",
        "mixed_precision",
        "channels_last",
        "torch_compile",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "timestep_density",
        "max_train_steps",
        *(one.name for one in fields(ContinualTrainingArguments) if one.name.startswith("adapter_")),
    ),
}
# Arguments that change the training but not its result.
HOW = ("deterministic", "max_nonfinite_steps", "checkpointing_steps", "checkpoints_total_limit")
# The same, but for this call only.
NOW = ("time_limit_minutes",)
# Arguments that select the images of a dataset.
_IMAGES = (
    "dataset_config_name",
    "dataset_revision",
    "image_column",
    "label_column",
    "train_split",
    "max_images_per_class",
)
EXIT_CODES = (
    "exit codes: 0 done; 75 (EX_TEMPFAIL) --time_limit_minutes is over, 143 SIGTERM, 130 Ctrl-C: the same command goes on; 1 an error; "
    "2 an unknown argument"
)
SETTINGS = tuple(
    name
    for name in (*_IMAGES, *(name for names in _RECIPE.values() for name in names), *HOW, *NOW)
    if name != "strategy"
)
"""The arguments of a run that `add_classes` takes."""


def settings_parser(
    own: argparse.ArgumentParser, settings: Sequence[Any], *, prog: str, to: str, description: str
) -> HfArgumentParser:
    """Return a parser of an `add`: its own arguments, and settings of a run, of which only those that are given are parsed.

    Args:
        own: a parser without help, to whose arguments the others are added.
        settings: dataclasses of the settings.
        to: what the usage calls the target.
    """
    parser = HfArgumentParser(
        settings,
        prog=prog,
        usage=f"%(prog)s [-h] IMAGES --to {to} [--OPTION VALUE ...]",
        description=description,
        epilog=EXIT_CODES,
        parents=[own],
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the defaults are the run's
    tidy_help(parser)
    return parser


def parse(arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """Parse a command line into arguments of `add_classes`. An unknown argument ends the process with 2."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "images",
        metavar="IMAGES",
        help="folder of images (one class with the folder's name); folder of class folders; parquet file; or dataset on the Hub",
    )
    own.add_argument("--to", required=True, help="folder of a run or of a pipeline, or repository of a base")
    own.add_argument(
        "--class_name", help="name of the class, if IMAGES has only one (default: the name of its folder)"
    )
    own.add_argument("--output_dir", help="folder for the adapters (default: the run; required for a base)")
    own.add_argument("--revision", help="branch, tag or commit of the repository")
    own.add_argument("--config", help="recipe of `funlora train`; only its settings of adapters and images are used")
    parser = settings_parser(
        own,
        [some_fields(kind, SETTINGS) for kind in _RECIPE],
        prog=prog,
        to="TO",
        description="Add classes to a run, a base or a repository: train an adapter for each class, and change nothing else. The "
        "defaults are the run's settings, or without a run the defaults of `funlora train`. A run of concepts takes "
        "pictures of more concepts and their --instance_prompt: `funlora add --to RUN --help`.",
    )
    given, unknown = parser.parse_known_args(arguments)
    refuse_unknown(parser, unknown)
    if "config" in given:
        left_out = take_recipe(parser, given.config, SETTINGS)
        if left_out:
            logger.info("%s: left out, only for `funlora train`: %s", given.config, ", ".join(left_out))
        given = parser.parse_args(arguments)
        del given.config
    return vars(given)


@dataclass(frozen=True)
class Added:
    """The result of `add_classes`.

    Args:
        base: run, pipeline or repository that has the base.
        output_dir: folder with the adapters, in `adapters/class_<id>/`.
        classes: class id -> the entry of the class in results.json under `added`.
        trained: ids of the new classes; the others already existed, from the same images and by the same recipe.
    """

    base: str
    output_dir: Path
    classes: dict[int, dict[str, Any]]
    trained: tuple[int, ...]


def add_classes(
    images: str | os.PathLike,
    to: str | os.PathLike,
    *,
    class_name: str | None = None,
    output_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    termination: Termination | None = None,
    **settings: Any,
) -> Added:
    """Train an adapter for each class of a dataset; change nothing else.

    The classes get ids above those of the base, of adapters and banks beside it and of classes that a run has yet to learn. All
    images are used for training, except those of a test split, and nothing is evaluated. If the process is killed, the same call
    continues, and writes the same bytes.

    Args:
        images (`str` or `os.PathLike`): Folder of images, which is one class with the folder's name; folder of class
            subfolders; or any dataset that `dataset_name` of a run accepts, on the Hub with its owner.
        to (`str` or `os.PathLike`): folder of a run or of a pipeline, or repository of a base.
        class_name (`str`, *optional*): name of the class, if there is only one.
        output_dir (`str` or `os.PathLike`, *optional*): Folder for `adapters/class_<id>/`. None: the run itself; required for
            a pipeline and a repository.
        revision (`str`, *optional*): branch, tag or commit of the repository.
        termination ([`Termination`], *optional*): an entered context, to stop at a checkpoint at SIGTERM and SIGINT.
        **settings:
            Arguments of a run that are in `SETTINGS`, such as `adapter_train_steps`. The defaults are the run's settings, or without
            a run the defaults of [`ModelArguments`] and [`ContinualTrainingArguments`].

    Returns:
        [`Added`].

    Raises:
        ValueError: arguments or images that cannot be used, a class whose name already exists, or existing adapters that were trained
            for another base; nothing is written then.
        FileNotFoundError: no such images, base or run.
        FolderInUseError: a run uses the folder.
        HfHubHTTPError: the repository cannot be read.
        NonFiniteLossError, WriteError, TimeLimitReached, Terminated: as for a run; finished classes are safe.
    """
    images, to = expanded("images", os.fspath(images)), expanded("to", os.fspath(to))
    for field, name, fixed in (("images", images, settings.get("dataset_revision")), ("to", to, revision)):
        if name != "digits":
            check_not_mistyped(f"`{field}` is {name!r}", name, revision=fixed)
    if not (os.path.exists(images) or "/" in images or images == "digits"):
        raise FileNotFoundError(
            f"`images` is {images!r}, which is no file or folder here. (A dataset on the Hub: owner/name.)"
        )
    folder = None if output_dir is None else Path(expanded("output_dir", os.fspath(output_dir)))
    target = _find(to, folder, revision)
    arguments = _arguments(images, target, settings)
    return _Addition(target, arguments, termination, class_name).add()


@dataclass(frozen=True)
class _Target:
    """Where classes are added.

    Args:
        name: run, pipeline or repository that has the base.
        revision: revision of `name`, if it is a repository.
        base: the base to train on.
        folder: folder for the adapters.
        present: adapters and banks beside the base and in the folder.
        known: id -> name of the existing classes and of those that a run has yet to learn.
        settings: settings of the run; empty if there is none.
    """

    name: str
    revision: str | None
    base: ExistingBase
    folder: RunFolder
    present: tuple[Contents, ...]
    known: Mapping[int, str]
    settings: Mapping[str, Any]


def _find(to: str, output_dir: Path | None, revision: str | None) -> _Target:
    place = Path(to)
    if revision is not None and place.is_dir():
        raise ValueError(
            f"`revision` is {revision!r}, but `to` {to!r} is a folder, expected a repository: leave it out."
        )
    refuse_concepts(to, place)
    run = RunFolder(place) if place.is_dir() and not (place / PIPELINE).is_file() else None
    try:
        settings = {} if run is None else run.settings()
    except FileNotFoundError:
        settings = {}  # the folder was pulled from a repository
    given = settings.get("ModelArguments", {}).get("base_model")
    try:
        name, revision = (
            (to, revision) if given is None else (given, settings["ModelArguments"]["base_model_revision"])
        )
        base = find_base(name, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            str(error).replace("`base_model`", "`to`" if given is None else "`base_model` of `to`")
        ) from error
    folder = _folder(to, run, output_dir)
    known = {**base.classes, **base.taken}
    present = [] if run is None else _contents(run.path)
    for contents in present if given is not None else ():  # if the base is in the run, `base.taken` has them
        known |= contents.classes()
    if folder is not run:
        present += _contents(folder.path)
    if run is not None and not run.results.is_file():
        known |= run.classes()
    return _Target(name, revision, base, folder, tuple(present), known, settings)


def _folder(to: str, run: RunFolder | None, output_dir: Path | None) -> RunFolder:
    if output_dir is None:
        if run is None:
            raise ValueError(
                f"`output_dir` is None, but `to` {to!r} is not a run: give a folder for the adapters, or name the run of the base by `to`."
            )
        return run
    if run is not None and output_dir.resolve() == run.path.resolve():
        return run
    folder = RunFolder(output_dir)
    if folder.classes() or any((output_dir / one).exists() for one in ("base", "model", PIPELINE)):
        raise ValueError(
            f"`output_dir` {os.fspath(output_dir)!r} contains a base: name it by `to`, or give another folder."
        )
    return folder


def _contents(folder: Path) -> list[Contents]:
    """Return the contents of a folder as a list, which is empty if there are none."""
    try:
        return [find_contents(folder)] if folder.is_dir() else []
    except FileNotFoundError:
        return []


def _arguments(images: str, target: _Target, given: Mapping[str, Any]) -> RunArguments:
    unknown = sorted(given.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is not an argument of `add`, expected some of: {', '.join(SETTINGS)}.")
    strategy = target.settings.get("ContinualTrainingArguments", {}).get("strategy", FunLora.name)
    if not issubclass(strategy_class(strategy), FunLora):
        raise ValueError(
            f"`to` is a run of `strategy` {strategy!r}, which has no adapters that a class could be added to: pass its generator, "
            f"{os.fspath(target.base.folder)}, as `to`, and give an `output_dir`."
        )
    # Each of the two replaces the other in the run's recipe.
    for one, other in (("adapter_train_steps", "adapter_epochs"), ("adapter_epochs", "adapter_train_steps")):
        if one in given and other not in given:
            # The run's limit would shorten the training.
            given = {"max_train_steps": None, **given, other: None}
            break

    def part(kind: type, **fixed: Any) -> Any:
        own = target.settings.get(kind.__name__, {})
        kept = {name: own[name] for name in (*_RECIPE[kind], *HOW) if name in own}
        return kind(**{**kept, **{one.name: given[one.name] for one in fields(kind) if one.name in given}, **fixed})

    return RunArguments(
        part(DataArguments, dataset_name=images),
        part(ModelArguments, base_model=target.name, base_model_revision=target.revision),
        part(
            ContinualTrainingArguments,
            output_dir=os.fspath(target.folder.path),
            # Each class is trained in a separate phase, so that classes that are added with it do not matter.
            class_batches="homogeneous",
            resume_from_checkpoint=LATEST,
        ),
        EvaluationArguments(),
    )


class _Addition(Run):
    """One call of `add_classes`."""

    def __init__(
        self, target: _Target, arguments: RunArguments, termination: Termination | None, class_name: str | None
    ) -> None:
        super().__init__(arguments, termination)
        self.target, self.base, self.added = target, target.base, AddedClasses(target.folder)
        try:
            images = self._images(target.base, hold_out=False, one_class=True)
        except (ValueError, OSError) as error:
            if len(error.args) == 1:  # use the names of the arguments here
                error.args = (str(error).replace("--dataset_name", "IMAGES").replace("dataset_name=", "images="),)
            raise
        self.images = self._renamed(images, class_name)
        # `update_class` finds the class by the name of the folder.
        self.dataset_name = arguments.data.dataset_name if class_name is None else os.path.join("FOLDER", class_name)
        self.digests = self.images.digests()

    def add(self) -> Added:
        """Lock the folder, and train the classes that do not exist yet."""
        is_main = self.accelerator.is_main_process
        self._check()
        with held(self.folder.path, self.accelerator, self.training), ended(self.accelerator):
            if is_main:
                recover_folder(self.folder.adapters)
                recover_folder(self.added.folder.checkpoints)
            self.accelerator.wait_for_everyone()
            # Again, since another process may have added classes until the folder was locked.
            data, records, there = self._choose()
            self.accelerator.wait_for_everyone()
            if is_main:
                begun = self.added.begun()
                for class_id, record in records.items():
                    _warn_of_dropped_steps(record, begun.get(class_id, {}))
                    self.added.keep(adapter_name(class_id), record)
            self.accelerator.wait_for_everyone()
            new = Task(1, tuple(class_id for class_id in data.class_names if class_id not in there))
            # An adapter may start from those in the folder, but not from those of this call, which a kill may have left.
            present = (class_in_name(folder.name) for folder in adapter_folders(self.folder.adapters))
            earlier = Task(0, tuple(c for c in present if c is not None and c not in data.class_names))
            strategy = self._strategy(self.base, data, [earlier, new])
            self._trainer(strategy, data, folder=self.added.folder).learn_beside(new)
            finished = self.added.finished()
            if is_main and self.folder.results.is_file():
                write_json(self.folder.results, {**read_mapping(self.folder.results), "added": finished})
        classes = {class_id: finished[str(class_id)] for class_id in data.class_names}
        return Added(self.target.name, self.folder.path, classes, new.class_ids)

    def _renamed(self, data: ImageClassificationData, class_name: str | None) -> ImageClassificationData:
        if class_name is None:
            return data
        check_class_name(class_name)
        if len(data.class_names) != 1:
            raise ValueError(
                f"`class_name` is {class_name!r}, expected the name of the one class in the images, which have "
                f"{len(data.class_names)}: {', '.join(data.class_names.values())}."
            )
        return replace(data, class_names=dict.fromkeys(data.class_names, class_name))

    def _check(self) -> None:
        """Raise all errors that can be found before anything is written."""
        strategy = cast(FunLora, self._strategy(self.base, self.images, []))
        strategy.check()
        own = method(strategy.adapter_config(next(iter(self.images.class_names))))
        configs: dict[Path, PeftConfig] = {}
        for contents in self.target.present:
            configs |= {folder: read_config(folder) for folder in contents.adapters}
            configs |= {file: read_bank(file).config for file in contents.banks}
        others = {method(config) for config in configs.values()} - {own}
        if others:
            raise ValueError(
                f"`peft_method` {self.model.peft_method!r} makes adapters of type {own}, expected {', '.join(sorted(others))} like the "
                "existing adapters: a generator has adapters of one method."
            )
        if configs:
            check = FingerprintCheck(read_unet(self.base.folder))
            for place, config in configs.items():
                check.check(config, os.fspath(place))
        self._choose()
        for class_id in self.images.class_names:
            self.images.images(class_id)  # raises if one cannot be read

    def _choose(self) -> tuple[ImageClassificationData, dict[int, dict[str, Any]], set[int]]:
        """Return the images under the ids of their classes, records of the classes to begin, by id, and ids of finished classes."""
        known = {
            **self.target.known,
            **{c: name for one in _contents(self.folder.path) for c, name in one.classes().items()},
        }
        begun = self.added.begun()
        going_on = {
            c: one["class_name"]
            for c, one in begun.items()
            if c not in known and one["class_name"] not in known.values()
        }
        names = list(self.images.class_names.values())
        data = self.images.with_class_ids(assign_class_ids(names, {**known, **going_on}))
        records = {
            class_id: self._record(class_id, name, digest)
            for (class_id, name), digest in zip(data.class_names.items(), self.digests.values(), strict=True)
        }
        keys = ("class_name", "images", "sha256", "recipe")
        same = {c for c, one in records.items() if all(begun.get(c, {}).get(key) == one[key] for key in keys)}
        clashing = [c for c in data.class_names if c in known and c not in same]
        if clashing:
            raise ValueError(
                f"`images` {self.arguments.data.dataset_name!r} has classes that already exist, or that the run has yet to "
                f"learn: {', '.join(f'{c} ({data.class_names[c]})' for c in clashing)}. Nothing was trained. A different "
                f"class needs another name: --class_name.{self._update(clashing)} The classes of the base are frozen."
            )
        return data, {c: record for c, record in records.items() if c not in same}, same & known.keys()

    def _update(self, class_ids: Sequence[int]) -> str:
        """Return a sentence with the command that trains again the first of these classes with an adapter; empty if none has."""
        class_id = next((c for c in class_ids if (self.folder.adapters / adapter_name(c)).is_dir()), None)
        if class_id is None:
            return ""
        given = self.arguments
        options = {
            one.name: getattr(part, one.name)
            for part in (given.data, given.model, given.training)
            for one in fields(part)
            if one.name in (*_IMAGES, *_RECIPE[type(part)]) and getattr(part, one.name) not in (None, one.default)
        }
        if options.pop("adapter_epochs", None) is not None:  # without a recipe, only steps can be given
            settings, count = (
                PhaseSettings.of(given.training, "adapter"),
                self.images.count(next(iter(self.images.class_names))),
            )
            options["adapter_train_steps"] = phase_steps(settings, count, given.training)
        if Path(self.target.name) != self.folder.path:
            options = {"base_model": self.target.name, **options}
        place = {
            "output_dir": os.fspath(self.folder.path),
            "update_class": class_id,
            "dataset_name": self.dataset_name,
        }
        return f" To train the adapter of class {class_id} again: `funlora train {as_options({**place, **options})}`."

    def _record(self, class_id: int, name: str, digest: Mapping[str, Any]) -> dict[str, Any]:
        settings = run_settings(self.arguments.data, self.model, self.training)
        return {
            "class_name": name,
            "dataset": self.images.name,
            "source": self.arguments.data.dataset_name,
            "images": digest["train_images"],
            "sha256": digest["sha256"],
            "recipe": {
                part.__name__: {name: settings[part.__name__][name] for name in names}
                for part, names in _RECIPE.items()
            },
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _warn_of_dropped_steps(record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Warn that the steps of a class are dropped, and name the settings that have changed since it was begun."""
    if before.get("class_name") == record["class_name"]:
        parts = record["recipe"].items()
        changed = [one for part, now in parts for one in told(differences(before["recipe"].get(part, {}), now))]
        if before["sha256"] != record["sha256"]:
            changed.append("other images")
        what = f"class {record['class_name']} was begun with other settings ({', '.join(changed)})"
        logger.warning("%s: its steps so far are dropped", what)
