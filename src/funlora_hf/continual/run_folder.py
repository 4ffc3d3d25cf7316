"""The folder of a run: its paths, what may be overwritten, and which settings a resumed run must match."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from ..adapters.class_folder import ADAPTERS_FOLDER, LORAS_FOLDER, adapter_name
from ..utils.arguments import as_options
from ..utils.checks import shortened
from ..utils.files import delete, read_mapping, recover_folder, remove_folder, write_json
from .config import ARGUMENTS, EvaluationArguments, measuring_settings


logger = logging.getLogger(__name__)

EVALUATION = EvaluationArguments.__name__
# Parts of the settings that follow from the arguments and the data.
_CLASSES, _TASKS = "classes", "tasks"
# Settings that do not change the results.
_FREE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "report_to",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "time_limit_minutes",
    "update_class",
    "update_mode",
    "deterministic",
    "max_nonfinite_steps",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_license",
}


class RunFolder:
    """Paths of a run in its output folder, and checks before anything is written there."""

    arguments: ClassVar[Sequence[Any]] = ARGUMENTS
    """Dataclasses of the settings of such a run; the last one is that of the evaluation."""
    learned: ClassVar[tuple[str, ...]] = ("base", "adapters", "model", LORAS_FOLDER)
    """What training writes, beside its checkpoints."""
    evaluates_again: ClassVar[bool] = True
    """Whether past tasks can be evaluated again, so that the settings of the evaluation may change until the run is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "base"
        self.adapters = path / ADAPTERS_FOLDER
        self.results = path / "results.json"
        self.figures = path / "figures"
        self.samples = self.figures / "samples.safetensors"
        self.checkpoints = path / "checkpoints"
        self.synthetic = self.checkpoints / "synthetic"
        self.evaluation = self.checkpoints / "evaluation"
        self._settings = self.checkpoints / "run.json"
        self._was_there: bool | None = None

    @property
    def _contents(self) -> tuple[str, ...]:
        return (*self.learned, self.results.name, self.figures.name, self.checkpoints.name, "logs")

    @property
    def _evaluation(self) -> str:
        return str(self.arguments[-1].__name__)

    def classes(self) -> dict[int, str]:
        """Return id -> name of all classes that the run in the folder has learned or will learn; empty without a run."""
        classes = self._written().get(_CLASSES, {}) if self._settings.is_file() else {}
        try:
            return {int(key.removeprefix("class ")): str(one["name"]) for key, one in classes.items()}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._settings} is damaged: `{_CLASSES}` has {error!r}.") from error

    def _written(self) -> dict[str, dict[str, Any]]:
        """Read the file of the settings, which exists."""
        written = read_mapping(self._settings)
        if odd := [part for part, values in written.items() if not isinstance(values, dict)]:
            raise ValueError(f"{self._settings} is damaged: {', '.join(map(repr, odd))}: expected mappings.")
        return written

    def class_figure(self, class_id: int) -> Path:
        """Return the path of the picture of a class's samples."""
        return self.figures / f"{adapter_name(class_id)}.png"

    def open(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        *,
        overwrite: bool,
        resume: bool,
        needed: Mapping[str, str] | None = None,
    ) -> None:
        """Take the folder for a run with these settings; one process calls this.

        Args:
            settings: the settings that a resumed run has to match, in parts.
            overwrite: delete another run in the folder.
            resume: go on with the run in the folder.
            needed: files and folders that the run reads, by the argument that names them.

        Raises:
            FileExistsError: the folder has a run, and neither `overwrite` nor `resume` is set.
            ValueError: `resume`, but the run there has other settings; `overwrite`, but what would be deleted is needed, a link, or not
                the run's.
        """
        present = [name for name in self._contents if (self.path / name).exists()]
        if present and overwrite:
            self._check_deletion(present, needed or {})
            delete(self.path / name for name in present)
            present = []
        if present and not resume:
            raise FileExistsError(self._there(present, settings))
        if not self._settings.is_file() and not {*self.learned, self.results.name} & set(present):
            present = []  # left by a run that was killed before it began
        if present and not self._settings.is_file():
            raise ValueError(
                f"`output_dir` {self.path} holds {', '.join(present)} but no {self._settings.relative_to(self.path)}, "
                "so its settings are unknown. Move them, or pass another folder."
            )
        if present:
            self.check_settings(settings)
            recover_folder(self.path)
            part = self._evaluation
            if measuring_settings(self.settings()[part]) != measuring_settings(settings.get(part, {})):
                self.forget_samples()
        self._warn_if_fresh(resume, present)
        write_json(self._settings, settings)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of the run in the folder, in parts; a setting of a later version has its default.

        Raises:
            FileNotFoundError: the folder has no run.
        """
        if not self._settings.is_file():
            there = (
                f"it has no {self._settings.relative_to(self.path)}"
                if self.path.is_dir()
                else "there is no such folder"
            )
            raise FileNotFoundError(f"{self.path} holds no run: {there}.")
        written = self._written()
        for part in self.arguments:
            defaults = {one.name: one.default for one in fields(part)}
            written[part.__name__] = {**defaults, **written.get(part.__name__, {})}
        return written

    def read_arguments(self) -> list[Any]:
        """Return the arguments of the run in the folder, one of each of `arguments`. Raises what `settings` does."""
        written = self.settings()
        return [
            part(**{one.name: written[part.__name__][one.name] for one in fields(part)}) for part in self.arguments
        ]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError unless a run with these settings can go on here. Those of the evaluation may change until it is finished."""
        finished = self.results.is_file()
        if differences := self._differences(settings, evaluation=finished or not self.evaluates_again):
            evaluate = (
                f" `funlora evaluate {self.path}` evaluates a finished run again."
                if finished and self.evaluates_again
                else ""
            )
            raise ValueError(
                f"`resume_from_checkpoint`: the run in {self.path} has other settings: {shortened('; '.join(told(differences)), 4000)}. Resume "
                f"with the same settings, or start again with --overwrite_output_dir.{evaluate}"
            )

    def unfinished(self) -> str | None:
        """Say how far the run in the folder is, such as "2 of 5 tasks are learned"; None: it is finished, or there is none."""
        if self.results.is_file() or not self._settings.is_file():
            return None
        learned = len(list(self.checkpoints.glob("strategy/task_*.safetensors")))
        # Runs of earlier versions do not list their tasks.
        return f"{learned} of {len(self._written().get(_TASKS, ())) or 'its'} tasks are learned"

    def forget_samples(self) -> None:
        """Delete the synthetic images, which only an unfinished run needs."""
        remove_folder(self.synthetic)

    def check_there(self) -> None:
        """Raise a FileNotFoundError if the folder has lost the settings that it had at the first call: further files would be
        only a part of a run."""
        if self._was_there is None:
            self._was_there = self._settings.is_file()
        if self._was_there and not self._settings.is_file():
            raise FileNotFoundError(
                f"`output_dir` {self.path} was deleted or moved during the run, so nothing more is written there. Bring it "
                "back and pass --resume_from_checkpoint latest, or start again."
            )

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Guard a block during which the folder has to stay; if it is gone, any error becomes that of `check_there`."""
        self.check_there()
        try:
            yield
        except Exception:
            self.check_there()
            raise

    def check_update(self) -> None:
        """Raise a FileNotFoundError unless the folder holds a run whose adapters can be updated."""
        if not self.adapters.is_dir():
            raise FileNotFoundError(
                f"`output_dir` {self.path} has no adapters/ folder, so `update_class` has nothing to update. Name the "
                "folder of a run."
            )

    def _differences(self, settings: Mapping[str, Any], *, evaluation: bool) -> dict[str, tuple[Any, Any]]:
        """Return how these settings differ from those of the run in the folder; `evaluation`: include those of the evaluation.

        Classes and tasks count only if no argument differs, since they follow from the arguments.
        """
        written = self.settings()
        parts = [part for part in settings if part in written and (evaluation or part != self._evaluation)]
        changed = {part: found for part in parts if (found := differences(written[part], settings[part]))}
        of_arguments = {part: found for part, found in changed.items() if part not in (_CLASSES, _TASKS)}
        return {name: pair for found in (of_arguments or changed).values() for name, pair in found.items()}

    def _there(self, present: Sequence[str], settings: Mapping[str, Any]) -> str:
        """Return an error text that says which run is in the folder, and how to go on."""
        go_on = "--resume_from_checkpoint latest to go on"
        known, finished = self._settings.is_file(), self.results.is_file()
        changed = self._differences(settings, evaluation=False) if known else {}
        if changed or not known:
            differing = shortened(", ".join(told(changed) or present), 1000)
            what = f"another run{', which is finished' * finished} ({differing})"
            # Names of classes and tasks have a space.
            own = {name: before for name, (before, _) in changed.items() if " " not in name}
            its = f"arguments ({shortened(as_options(own), 1000)})" if own else "images"
            go_on = f"its {its} and {go_on} with it" if changed and not finished else ""
        elif (state := self.unfinished()) is not None:
            what = f"this run, unfinished: {state}"
        else:
            what, go_on = f"this run, which is finished (see `funlora info {self.path}`)", ""
        delete = "--overwrite_output_dir to delete it" if known else ""
        ways = [way for way in (go_on, delete, "or another folder" if go_on or delete else "another folder") if way]
        return f"`output_dir` {self.path} holds {what}. Pass {', '.join(ways)}."

    def _warn_if_fresh(self, resume: bool, present: list[str]) -> None:
        started = any((self.path / name).exists() for name in self.learned)
        if resume and not started and not list(self.checkpoints.glob("*/step_*")):
            place = "holds a run without one" if present else "holds no run"
            logger.warning("No checkpoint to resume from: %s %s. Starting from the beginning.", self.path, place)

    def _check_deletion(self, present: Sequence[str], needed: Mapping[str, str]) -> None:
        for name in present:
            path = self.path / name
            if path.is_symlink():
                raise ValueError(
                    f"`overwrite_output_dir` is set, but {path} is a link: move it, or choose another `output_dir`."
                )
            for field, place in needed.items():
                if Path(place).resolve().is_relative_to(path.resolve()):
                    raise ValueError(
                        f"`overwrite_output_dir` would delete {path}, which contains `{field}` {place!r}: choose another "
                        "`output_dir`."
                    )
        found = [name for name in present if (self.path / name).is_file() or any((self.path / name).iterdir())]
        if found and not self._settings.is_file():
            raise ValueError(
                f"`overwrite_output_dir` would delete {', '.join(found)} in {self.path}, but without a "
                f"{self._settings.relative_to(self.path)} it is unknown whether a run has made them: move them, or choose another "
                "`output_dir`."
            )
        own = {adapter_name(class_id) for class_id in self.classes()}
        others = sorted(one.name for one in self.adapters.glob("[!.]*") if one.name not in own)
        if others:
            raise ValueError(
                f"`overwrite_output_dir` would delete {', '.join(others)} in {self.adapters}, which the run there has not learned: move "
                "them, delete them by `funlora delete`, or choose another `output_dir`."
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that have changed, with both values, without those that do not change the results."""
    pairs = {name: (before.get(name), now.get(name)) for name in {**before, **now} if name not in _FREE}
    return {name: (one, other) for name, (one, other) in pairs.items() if repr(one) != repr(other)}


def told(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return a text for each of the `differences`."""
    return [f"{name} was {before!r} and is {now!r}" for name, (before, now) in changed.items()]
