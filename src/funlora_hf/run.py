"""Do a whole run from its arguments: data, tasks, strategy, training, evaluation, report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, str_to_bool

from .continual.base import ExistingBase, find_base, local_source
from .continual.batches import RealImages
from .continual.config import (
    DIGITS_UNET,
    LATEST,
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    LoopArguments,
    ModelArguments,
    parse_options,
    run_settings,
)
from .continual.costs import count_parts, measure_parts
from .continual.publishing import Publisher
from .continual.run_context import ended, held, start_trackers
from .continual.run_folder import EVALUATION, RunFolder
from .continual.strategies.peft_methods import peft_method
from .continual.strategies.registry import strategy_class
from .continual.strategy import Setting, Strategy
from .continual.termination import Termination
from .continual.time_limit import TimeLimit
from .continual.trainer import ContinualTrainer, Listener
from .data.class_ids import assign_class_ids, ordered_class_ids
from .data.image_data import ImageClassificationData, load_image_data
from .data.known_counts import KnownCounts
from .data.tasks import Task, split_into_tasks
from .evaluation.evaluator import RunEvaluator
from .evaluation.features import InceptionFeatures
from .evaluation.report import report_evaluation, report_finished, report_run
from .evaluation.tables import costs_table, how_to_see
from .evaluation.task_log import TaskLog
from .hub.concept_folders import refuse_concepts
from .sampling.solvers import DOPRI5_EVALUATIONS
from .utils.checks import check_class_name, shortened
from .utils.files import recover_folder


@dataclass
class RunArguments:
    """All arguments of a run, checked against each other.

    Raises:
        ValueError: `unet_config` is missing for images other than digits, or the strategy does not fit other arguments.
    """

    data: DataArguments
    model: ModelArguments
    training: ContinualTrainingArguments
    evaluation: EvaluationArguments

    def __post_init__(self) -> None:
        _check_strategy(self)
        given = self.model.unet_config is not None or self.model.base_model is not None
        if given or _strategy_of(self.training).outside_data:
            return
        if self.data.dataset_name != "digits" and self.training.update_class is None:
            name = self.data.dataset_name
            here = ", which is no file or folder here (a dataset on the Hub is 'owner/name')"
            raise ValueError(
                f"`dataset_name` is {name!r}{'' if os.path.exists(name) else here}, and `unet_config` is None, "
                "which is the U-Net for 8x8 digits: give the arguments of a UNet2DModel, use a recipe by --config, or name an "
                "existing generator by --base_model."
            )
        self.model.unet_config = dict(DIGITS_UNET)

    @classmethod
    def of(cls, folder: str | os.PathLike) -> RunArguments:
        """Return the arguments of the run in a folder; the folder may have been moved.

        Raises:
            FileNotFoundError: there is no run in the folder.
            ConceptsError: a run of concepts.
        """
        refuse_concepts(folder, Path(folder))
        arguments = cls(*RunFolder(Path(folder)).read_arguments())
        arguments.training.output_dir = os.fspath(folder)
        return arguments


def run(arguments: RunArguments, *, termination: Termination | None = None) -> dict[str, Any] | None:
    """Train, evaluate and report, or resume a run that was stopped.

    Args:
        arguments ([`RunArguments`]): the arguments of the run.
        termination ([`Termination`], *optional*): an entered context, for a run that SIGTERM and SIGINT should stop at a checkpoint.

    Returns:
        `dict`: the contents of results.json; None after `update_class`, and on all processes except the main one.

    Raises:
        ImportError, OSError: `image_quality` is "inception", which is not available here; nothing is written.
        PushError: `push_to_hub` is set, but the finished run could not be pushed.
        ForgettingError: the samples of an earlier class, or the base, have changed; results.json is still written.
        TimeLimitReached: `time_limit_minutes` is over; the run can be resumed.
        Terminated: the process received SIGTERM or SIGINT; the run can be resumed.
        FolderInUseError: another run uses `output_dir`.
        WriteError: a file could not be written; finished parts are safe.
        ValueError, FileExistsError, FileNotFoundError: arguments that do not fit each other, the data or the folder.
    """
    joined, class_id = Run(arguments, termination), arguments.training.update_class
    if class_id is None:
        return joined.learn()
    joined.update(class_id)
    return None


def evaluate(folder: str | os.PathLike, evaluation: EvaluationArguments | None = None) -> dict[str, Any] | None:
    """Evaluate a finished run, later or again: rewrite the results of evaluation in results.json and in figures/.

    If the strategy changes its generator, only its last state can be evaluated.

    Args:
        folder (`str` or `os.PathLike`): folder of the run.
        evaluation ([`EvaluationArguments`], *optional*): settings of the evaluation; None: the run's settings.

    Returns:
        `dict`: the contents of results.json; None on all processes except the main one.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
        FolderInUseError: another run uses the folder.
        ValueError: `evaluation.evaluation` is False, or the data or the classes differ from those of the run.
    """
    arguments = RunArguments.of(folder)
    training, given = arguments.training, evaluation or replace(arguments.evaluation, evaluation=True)
    if not given.evaluation:
        raise ValueError("`evaluation` is False, expected True: leave --no_evaluation out.")
    # These would stop the evaluation early, or send results elsewhere.
    training.time_limit_minutes, training.report_to = None, "none"
    training.push_to_hub, training.hub_model_id = False, None
    return Run(replace(arguments, evaluation=given), None).evaluate()


def dry_run(arguments: RunArguments) -> str:
    """Measure what a run would cost on this machine, by a few steps in a temporary folder.

    Args:
        arguments ([`RunArguments`]): the arguments of the run.

    Returns:
        `str`: a table, and its assumptions.

    Raises:
        ValueError, FileNotFoundError: `update_class` is given, or arguments do not fit each other or the data.
    """
    training, evaluation = arguments.training, arguments.evaluation
    if training.update_class is not None:
        raise ValueError(
            "`dry_run` and `update_class` are both given, expected one of them: a dry run measures a whole run."
        )
    if evaluation.image_quality == "inception":
        evaluation = replace(evaluation, image_quality="none")  # its weights would be downloaded
    with TemporaryDirectory() as folder:
        # Compiling would take minutes.
        training = replace(training, output_dir=folder, torch_compile=False)
        return Run(RunArguments(arguments.data, arguments.model, training, evaluation), None).costs()


class Run:
    """Creates and joins the parts of a run; its time limit starts when it is created."""

    def __init__(self, arguments: RunArguments, termination: Termination | None) -> None:
        self.arguments = arguments
        self.model, self.training = arguments.model, arguments.training
        self.limit = TimeLimit(self.training.time_limit_minutes)
        self.termination = termination
        self.strategy_class = _strategy_of(self.training)
        self.accelerator = make_accelerator(self.training)
        self.folder = RunFolder(Path(self.training.output_dir))

    def learn(self) -> dict[str, Any] | None:
        """Train, evaluate and report; resume a run where it stopped."""
        strategy, data = self.prepared()
        with held(self.folder.path, self.accelerator, self.training):
            if self.accelerator.is_main_process:
                overwrite, resume = self.training.overwrite_output_dir, self.training.resume_from_checkpoint == LATEST
                of_tasks = {f"task {task.index + 1}": list(task.class_ids) for task in strategy.setting.tasks}
                settings = {**self._settings(), "classes": data.digests(), "tasks": of_tasks}
                read = {"dataset_name": self.arguments.data.dataset_name}
                if strategy.setting.has_base or strategy.outside_data:
                    field = "pretrained" if strategy.outside_data else "base_model"
                    read[field] = os.fspath(strategy.setting.base_dir)
                needed = {field: place for field, place in read.items() if Path(place).exists()}
                self.folder.open(settings, overwrite=overwrite, resume=resume, needed=needed)
            self.accelerator.wait_for_everyone()
            start_trackers(self.accelerator, self.training)
            with self.folder.staying():
                return self._learn(strategy, data)

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluate a finished run."""
        if not self.folder.results.is_file():
            raise FileNotFoundError(
                f"{self.folder.path} has no {self.folder.results.name}, expected a finished run: to continue an unfinished one, pass "
                "--resume_from_checkpoint latest to `funlora train`."
            )
        strategy, data = self.prepared()
        evaluator = self._evaluator(strategy, data)
        with held(self.folder.path, self.accelerator, self.training):
            if self.accelerator.is_main_process:
                of_run = {name: part for name, part in self._settings().items() if name != EVALUATION}
                self.folder.check_settings({**of_run, "classes": data.digests()})
                recover_folder(self.folder.path)
            self.accelerator.wait_for_everyone()
            with self.folder.staying():
                with ended(self.accelerator):
                    self._trainer(strategy, data).restore()
                    if self.accelerator.is_main_process:
                        evaluator.forget()
                    for task in evaluator.tasks:
                        self.accelerator.wait_for_everyone()
                        evaluator.end_task(task)
                    self.accelerator.wait_for_everyone()
                return report_evaluation(evaluator) if self.accelerator.is_main_process else None

    def costs(self) -> str:
        """Measure what the run costs. Its folder cannot be used for a run afterwards."""
        given, evaluation = self.arguments.data, self.arguments.evaluation
        known = None if self.model.base_model else KnownCounts.of(given.dataset_name, given.max_images_per_class)
        strategy, data = self.prepared(known)
        parts = count_parts(strategy, data, evaluation)
        measure_parts(parts, strategy, self.accelerator, evaluation)
        notes = [] if known is None else [f"{given.dataset_name} was not opened; assumed: {known}."]
        solvers = {evaluation.solver, (parse_options(self.training.strategy_options) or {}).get("solver")}
        if "dopri5" in solvers:
            notes.append(
                f"dopri5 chooses its steps; assumed: {DOPRI5_EVALUATIONS} evaluations per image, as measured on digits."
            )
        return "\n".join([costs_table(parts), *notes])

    def update(self, class_id: int) -> None:
        """Train one adapter of a finished run again, on the current images of its class."""
        self.folder.check_update()
        with held(self.folder.path, self.accelerator, self.training):
            if self.accelerator.is_main_process:
                recover_folder(self.folder.adapters)  # after a killed process
            self.accelerator.wait_for_everyone()
            start_trackers(self.accelerator, self.training)
            with ended(self.accelerator):
                name = self.model.base_model or os.fspath(self.folder.base)
                base = find_base(name, revision=self.model.base_model_revision).with_adapters(self.folder.adapters)
                data = self._data(base, one_class=True)
                self._trainer(self._strategy(base, data, []), data).update_class(class_id)
        if self.accelerator.is_main_process:
            print(how_to_see(self.model.base_model or os.fspath(self.folder.path), self.folder.path, [class_id]))

    def _learn(self, strategy: Strategy, data: ImageClassificationData) -> dict[str, Any] | None:
        """Do the work of `learn` after the folder has been opened."""
        accelerator, folder, training = self.accelerator, self.folder, self.training
        is_main = accelerator.is_main_process
        publisher = Publisher(training, strategy.setting.tasks) if training.push_to_hub and is_main else None
        if folder.results.is_file():
            accelerator.end_training()
            results = report_finished(folder) if is_main else None
        else:
            evaluator = self._evaluator(strategy, data)
            listeners: list[Listener] = [evaluator, TaskLog(evaluator)]
            listeners += [] if publisher is None else [publisher]
            with ended(self.accelerator):
                self._trainer(strategy, data, listeners).train()
            if not is_main:
                return None
            folder.check_there()
            results = report_run(evaluator, settings=self._settings())
        if publisher is not None:
            publisher.end_run()
        return results

    def prepared(self, counts: KnownCounts | None = None) -> tuple[Strategy, Any]:
        """Return a run's strategy and data after all checks; write nothing. With `counts`, do not open the data."""
        name, unet = self.model.base_model, None if self.model.unet_config is None else self.model.unet
        revision = self.model.base_model_revision
        base = None if name is None else find_base(name, revision=revision, unet_config=unet)
        data = counts or self._data(base)
        strategy = self._strategy(base, data, self._tasks(data, base))
        strategy.check()
        evaluation = self.arguments.evaluation
        if evaluation.evaluation and evaluation.image_quality == "inception" and self.accelerator.is_main_process:
            InceptionFeatures()  # it downloads its weights, or fails now instead of after days
        return strategy, data

    def _settings(self) -> dict[str, Any]:
        return run_settings(self.arguments.data, self.model, self.training, self.arguments.evaluation)

    def _data(self, base: ExistingBase | None, **how: bool) -> ImageClassificationData:
        """Return the images; with an existing base, under the base's ids for their classes or under free ids."""
        data = self._images(base, **how)
        if base is None:
            return data
        # A resumed run keeps its ids, even if classes have been added beside its base since.
        own = {} if self.training.overwrite_output_dir else self.folder.classes()
        # A class that was added may have the name of a class that the run never learned.
        learned = set(base.classes.values())
        known = {**{c: name for c, name in own.items() if name not in learned}, **base.classes}
        return data.with_class_ids(assign_class_ids(list(data.class_names.values()), known, taken=base.taken))

    def _images(self, base: ExistingBase | None, **how: bool) -> ImageClassificationData:
        """Return the images under the dataset's ids; `how`: flags of `load_image_data`."""
        given, (channels, size) = self.arguments.data, self._image_shape(base)
        data = load_image_data(
            given.dataset_name,
            image_column=given.image_column,
            label_column=given.label_column,
            train_split=given.train_split,
            test_split=given.test_split,
            image_size=size,
            channels=channels,
            validation_fraction=given.validation_fraction,
            dataset_config_name=given.dataset_config_name,
            revision=given.dataset_revision,
            max_images_per_class=given.max_images_per_class,
            **how,
        )
        for name in data.class_names.values():
            # Check now, not after its adapter has been trained.
            check_class_name(name)
        return data

    def _tasks(self, data: ImageClassificationData | KnownCounts, base: ExistingBase | None) -> list[Task]:
        given = self.arguments.data
        known = {} if base is None else base.classes
        new = {class_id: name for class_id, name in data.class_names.items() if class_id not in known}
        tasks = split_into_tasks(
            list(data.class_names) if given.class_order is None else ordered_class_ids(given.class_order, new),
            given.classes_per_task,
            class_order_seed=given.class_order_seed,
            first_task=None if base is None else list(base.classes),
        )
        if base is not None and len(tasks) == 1:
            raise ValueError(
                f"`dataset_name` {given.dataset_name!r} has only classes that `base_model` already has: "
                f"{', '.join(base.classes.values())}. Give a dataset with new classes."
            )
        if len(tasks) == 1 and given.num_tasks != 1:
            warnings.warn(
                f"`classes_per_task` is {given.classes_per_task}, and there are {len(tasks[0].class_ids)} classes: task 1 has all of "
                "them, and nothing is learned after it.",
                stacklevel=2,
            )
        if given.num_tasks is not None and given.num_tasks > len(tasks):
            raise ValueError(
                f"`num_tasks` is {given.num_tasks}, but there are {len(tasks)} tasks of `classes_per_task` {given.classes_per_task}: "
                f"expected at most {len(tasks)}, or None for all."
            )
        return tasks[: given.num_tasks]

    def _strategy(
        self, base: ExistingBase | None, data: ImageClassificationData | KnownCounts, tasks: list[Task]
    ) -> Strategy:
        setting = Setting(
            output_dir=self.folder.path,
            base_dir=self.folder.base if base is None else base.folder,
            base_source=local_source(self.folder.base) if base is None else base.source,
            has_base=base is not None,
            class_names={**({} if base is None else base.classes), **data.class_names},
            tasks=tuple(tasks),
            model=self.model,
            image_shape=self._image_shape(base),
            training=self.training,
            device=self.accelerator.device,
            num_images={class_id: data.count(class_id) for class_id in data.class_names},
        )
        return self.strategy_class(setting)

    def _image_shape(self, base: ExistingBase | None) -> tuple[int, int]:
        """Return channels and height of the images."""
        if base is not None:
            return base.channels, base.image_size
        options = self.strategy_class.make_options(self.training.strategy_options or {})
        return self.strategy_class.image_shape(self.model, options)

    def _evaluator(self, strategy: Strategy, data: ImageClassificationData) -> RunEvaluator:
        config = self.arguments.evaluation
        return RunEvaluator(strategy, data, config=config, folder=self.folder, accelerator=self.accelerator)

    def _trainer(
        self,
        strategy: Strategy,
        data: ImageClassificationData,
        listeners: Sequence[Listener] = (),
        *,
        folder: RunFolder | None = None,
    ) -> ContinualTrainer:
        return ContinualTrainer(
            strategy,
            RealImages(data, self.training, self.accelerator.device, random_flip=self.arguments.data.random_flip),
            folder=folder or self.folder,
            accelerator=self.accelerator,
            listeners=listeners,
            limit=self.limit,
            termination=self.termination,
        )


def _strategy_of(training: ContinualTrainingArguments) -> type[Strategy]:
    """Return the strategy of a run, in the form that its options choose."""
    return strategy_class(training.strategy, parse_options(training.strategy_options))


def _check_strategy(arguments: RunArguments) -> None:
    strategy_cls = _strategy_of(arguments.training)
    peft_method(arguments.model.peft_method)
    strategy_cls.make_options(arguments.training.strategy_options or {})
    base_model = arguments.model.base_model
    for name in ("base_model", "unet_config") if strategy_cls.outside_data else ():
        if (given := getattr(arguments.model, name)) is not None:
            raise ValueError(
                f"`{name}` is {shortened(repr(given), 100)}, but `strategy` {strategy_cls.name!r} learns on the pipeline that its option "
                "`pretrained` names: leave one of the two out."
            )
    at_once = "all_tasks" in strategy_cls.requires
    if (at_once or strategy_cls.trains_own_base) and base_model is not None:
        trains = "on all tasks at once" if at_once else "a base of its own"
        raise ValueError(
            f"`strategy` {strategy_cls.name!r} trains {trains}, so it cannot add classes to `base_model` "
            f"{base_model!r}: leave one of the two out."
        )
    unmet = sorted(strategy_cls.requires - {"all_tasks"})
    if unmet:
        raise ValueError(
            f"`strategy` {strategy_cls.name!r} requires {', '.join(map(repr, unmet))}, which a run of a class-conditional "
            "U-Net does not have: choose another strategy."
        )
    if arguments.model.peft_method != "funlora" and strategy_cls.name != "funlora":
        raise ValueError(
            f"`peft_method` is {arguments.model.peft_method!r}, which `strategy` {strategy_cls.name!r} ignores: leave one of "
            "the two out."
        )


# Variables that `accelerate launch` and its config may set for the whole process -> the argument of a run with the same meaning.
_LAUNCHER = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}
# Variables of features that it may switch on and a run does not support.
_UNUSED_BY_RUNS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (such as tensor, context or sequence parallel)",
}


def _check_launcher(training: LoopArguments) -> None:
    """Refuse settings of the launcher that differ from the run's, or that the run would ignore."""
    for variable, field in _LAUNCHER.items():
        launched, own = os.environ.get(variable), getattr(training, field)
        if launched is not None and launched.lower() != str(own):
            raise ValueError(
                f"`{field}` is {own!r}, but the launcher has set {variable} to {launched!r}: pass --{field} {launched.lower()}, or "
                "change accelerate's config."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise ValueError(
            f"The launcher has set ACCELERATE_DYNAMO_BACKEND to {backend!r}, which a run does not use: pass --dynamo_backend no "
            "to `accelerate launch`, and --torch_compile here."
        )
    for variable, name in _UNUSED_BY_RUNS.items():
        if str_to_bool(os.environ.get(variable, "false")):
            raise ValueError(
                f"The launcher has switched on {name}, which a run does not use: switch it off in its config."
            )


def make_accelerator(training: Any) -> Accelerator:
    """Make the accelerator of a process.

    Args:
        training ([`ContinualTrainingArguments`]): Arguments with `mixed_precision`, `gradient_accumulation_steps`,
            `report_to` and `output_dir`; other scripts pass theirs.

    Raises:
        ValueError: one of these settings is not available here, or differs from the launcher's.
    """
    _check_launcher(training)
    # Processes that train independent adapters wait for the slowest one, which may take days.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            log_with=None if training.report_to == "none" else training.report_to,
            project_dir=training.output_dir,
            kwargs_handlers=[patience],
        )
        if training.report_to != "none" and not accelerator.log_with:
            # accelerate ignores such a tracker without a message.
            raise ImportError("its package is not installed")
        return accelerator
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"`report_to` {training.report_to!r} or `mixed_precision` {training.mixed_precision!r} is not available here: "
            f'{error} (trackers: pip install "funlora-hf[trackers]" has tensorboard)'
        ) from error
