"""A whole run from its arguments: data, tasks, strategy, training, evaluation, report. Joins the parts; does no work."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .adapters.class_folder import ADAPTERS_FOLDER
from .continual.config import (
    DIGITS_UNET,
    LATEST,
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    run_settings,
)
from .continual.devices import deterministic_kernels
from .continual.existing_base import ExistingBase, find_base
from .continual.publishing import Publisher
from .continual.run_folder import RunFolder
from .continual.strategies.registry import strategy_class
from .continual.strategy import Setting, Strategy
from .continual.termination import Termination
from .continual.time_limit import TimeLimit, TimeLimitReached
from .continual.trainer import ContinualTrainer, Evaluator
from .data.image_data import ImageClassificationData, Task, assign_class_ids, load_image_data, split_into_tasks
from .evaluation.evaluator import RunEvaluator, classifier_config
from .evaluation.features import InceptionFeatures
from .evaluation.report import report_finished, report_run
from .utils.checks import check_class_name
from .utils.locks import folder_lock


@dataclass
class RunArguments:
    """All arguments of a run, checked against each other.

    Raises:
        ValueError: `unet_config` is missing for other images than digits, or an argument of the classifier is out of
            range.
    """

    data: DataArguments
    model: ModelArguments
    training: ContinualTrainingArguments
    evaluation: EvaluationArguments

    def __post_init__(self) -> None:
        # Checked now, not when the first task has been trained.
        classifier_config(self.evaluation, self.training.max_train_steps)
        _check_strategy(self)
        if self.model.unet_config is not None or self.model.base_model is not None:
            return
        if self.data.dataset_name != "digits" and self.training.update_class is None:
            raise ValueError(
                f"`unet_config` is None, which is the U-Net for 8x8 digits, and `dataset_name` is "
                f"{self.data.dataset_name!r}: give the arguments of a UNet2DModel, take a recipe by --config, or name "
                "an existing generator by --base_model."
            )
        self.model.unet_config = dict(DIGITS_UNET)


def run(arguments: RunArguments, *, termination: Termination | None = None) -> dict[str, Any] | None:
    """
    Train, evaluate and report; resumes where a run stopped if it is told to.

    Args:
        arguments ([`RunArguments`]): what to do.
        termination ([`Termination`], *optional*): an entered one, for a run that SIGTERM has to end at a checkpoint.

    Returns:
        `dict`: the contents of results.json; None after `update_class`, and on all processes but the main one.

    Raises:
        ImportError, OSError: `image_quality` is "inception", which cannot be had; nothing is written.
        PushError: `push_to_hub`, but the finished run could not be pushed.
        ForgettingError: the samples of an earlier class, or the base, have changed. results.json is written all the
            same.
        TimeLimitReached: `time_limit_minutes` is over; everything is on disk to go on from.
        Terminated: SIGTERM has come; likewise.
        FolderInUseError: another run is at work in `output_dir`.
        WriteError: a file could not be written; what is finished is safe.
        ValueError, FileExistsError, FileNotFoundError: arguments that do not fit each other, the data or the folder.
    """
    training, model = arguments.training, arguments.model
    stops = _Stops(TimeLimit(training.time_limit_minutes), termination)
    strategy_cls = strategy_class(training.strategy)
    accelerator = _accelerator(training)
    folder = RunFolder(Path(training.output_dir))
    if training.update_class is not None:
        return _update(arguments, strategy_cls, folder, accelerator, stops)
    base = None if model.base_model is None else find_base(model.base_model, revision=model.base_model_revision)
    data = _load_data(arguments, base)
    tasks = _tasks(arguments, data, base)
    strategy = strategy_cls(_setting(arguments, folder, base, data, tasks, accelerator))
    strategy.check()
    if arguments.evaluation.image_quality == "inception" and accelerator.is_main_process:
        InceptionFeatures()  # downloads its weights, or fails now, not after days
    with _held(folder, accelerator), deterministic_kernels(accelerator.device, wanted=training.deterministic):
        _open_folder(folder, arguments, accelerator)
        with folder.staying():
            return _learn(arguments, strategy, data, tasks, folder, accelerator, stops)


def _learn(
    arguments: RunArguments,
    strategy: Strategy,
    data: ImageClassificationData,
    tasks: list[Task],
    folder: RunFolder,
    accelerator: Accelerator,
    stops: _Stops,
) -> dict[str, Any] | None:
    """Train, evaluate and report in the folder, which is opened."""
    training = arguments.training
    publisher = _publisher(training, tasks, accelerator)
    if folder.results.is_file():
        accelerator.end_training()
        return _finished(folder, publisher) if accelerator.is_main_process else None
    evaluator = RunEvaluator(
        strategy,
        data,
        tasks,
        config=arguments.evaluation,
        seed=training.seed,
        folder=folder,
        accelerator=accelerator,
        max_train_steps=training.max_train_steps,
    )
    listener = evaluator if publisher is None else _Listeners(evaluator, publisher)
    trainer = _trainer(arguments, strategy, data, tasks, folder, accelerator, stops, listener)
    with _ends(accelerator):
        trainer.train()
    if not accelerator.is_main_process:
        return None
    folder.check_there()
    settings = run_settings(arguments.data, arguments.model, training, arguments.evaluation)
    results = report_run(evaluator, settings=settings, folder=folder, num_processes=accelerator.num_processes)
    if publisher is not None:
        publisher.end_run()
    return results


@dataclass
class _Stops:
    """What may end a run before its end."""

    limit: TimeLimit
    termination: Termination | None


def _held(folder: RunFolder, accelerator: Accelerator) -> AbstractContextManager[None]:
    """The folder's lock, which the main process holds for all."""
    return folder_lock(folder.path) if accelerator.is_main_process else nullcontext()


@dataclass
class _Listeners:
    """Tells one after the other that a task is over; the second is only on the main process."""

    evaluator: RunEvaluator
    publisher: Publisher

    def end_task(self, task: Task) -> None:
        self.evaluator.end_task(task)
        self.publisher.end_task(task)


def _publisher(training: ContinualTrainingArguments, tasks: list[Task], accelerator: Accelerator) -> Publisher | None:
    """What pushes the run, on the main process; None: nothing does."""
    return Publisher(training, tasks) if training.push_to_hub and accelerator.is_main_process else None


def _finished(folder: RunFolder, publisher: Publisher | None) -> dict[str, Any]:
    results = report_finished(folder)
    if publisher is not None:
        publisher.end_run()
    return results


def _update(
    arguments: RunArguments,
    strategy_cls: type[Strategy],
    folder: RunFolder,
    accelerator: Accelerator,
    stops: _Stops,
) -> None:
    """Train one adapter of a finished run again, on the images that its class has now."""
    folder.check_update()
    deterministic = arguments.training.deterministic
    with _held(folder, accelerator), deterministic_kernels(accelerator.device, wanted=deterministic):
        if accelerator.is_main_process:
            folder.recover_adapters()
        accelerator.wait_for_everyone()
        with _ends(accelerator):
            _train_again(arguments, strategy_cls, folder, accelerator, stops)


def _train_again(
    arguments: RunArguments,
    strategy_cls: type[Strategy],
    folder: RunFolder,
    accelerator: Accelerator,
    stops: _Stops,
) -> None:
    model = arguments.model
    base = find_base(model.base_model or os.fspath(folder.base), revision=model.base_model_revision)
    base = base.with_adapters(folder.path / ADAPTERS_FOLDER)
    data = _load_data(arguments, base)
    strategy = strategy_cls(_setting(arguments, folder, base, data, [], accelerator))
    trainer = _trainer(arguments, strategy, data, [], folder, accelerator, stops)
    trainer.update_class(arguments.training.update_class)


def _check_strategy(arguments: RunArguments) -> None:
    strategy_cls = strategy_class(arguments.training.strategy)
    strategy_cls.make_options(arguments.training.strategy_options or {})
    base_model = arguments.model.base_model
    if "all_tasks" in strategy_cls.requires and base_model is not None:
        raise ValueError(
            f"`strategy` {strategy_cls.name!r} trains on all tasks at once, so it cannot add classes to `base_model` "
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
            f"`peft_method` is {arguments.model.peft_method!r}, which `strategy` {strategy_cls.name!r} does not heed: "
            "leave one of the two out."
        )


def _accelerator(training: ContinualTrainingArguments) -> Accelerator:
    # Processes that train independent adapters meet again when the slowest is done, which may take days.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    tracked = training.report_to != "none"
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            log_with=training.report_to if tracked else None,
            project_dir=training.output_dir,
            kwargs_handlers=[patience],
        )
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"`report_to` {training.report_to!r} or `mixed_precision` {training.mixed_precision!r} cannot be had here: "
            f'{error} (trackers: pip install "funlora-hf[trackers]" has tensorboard)'
        ) from error
    return accelerator


@contextmanager
def _ends(accelerator: Accelerator) -> Iterator[None]:
    """Ends trackers and the group of processes when training has ended, also where its time is over. Else gloo may abort the process
    at its end."""
    try:
        yield
    except TimeLimitReached as reached:
        # Its frames hold a model that is wrapped for the group.
        traceback.clear_frames(reached.__traceback__)
        accelerator.end_training()
        raise
    accelerator.end_training()


def _load_data(arguments: RunArguments, base: ExistingBase | None) -> ImageClassificationData:
    given, unet = arguments.data, arguments.model.unet_config
    data = load_image_data(
        given.dataset_name,
        image_column=given.image_column,
        label_column=given.label_column,
        train_split=given.train_split,
        test_split=given.test_split,
        image_size=unet["sample_size"] if base is None else base.image_size,
        channels=unet.get("in_channels", 3) if base is None else base.channels,
        validation_fraction=given.validation_fraction,
        dataset_config_name=given.dataset_config_name,
        revision=given.dataset_revision,
        max_images_per_class=given.max_images_per_class,
    )
    for name in data.class_names.values():
        # Now, not when its adapter has been trained.
        check_class_name(name)
    if base is None:
        return data
    return data.with_class_ids(assign_class_ids(list(data.class_names.values()), base.classes))


def _tasks(arguments: RunArguments, data: ImageClassificationData, base: ExistingBase | None) -> list[Task]:
    given = arguments.data
    tasks = split_into_tasks(
        list(data.class_names),
        given.classes_per_task,
        class_order_seed=given.class_order_seed,
        first_task=None if base is None else list(base.classes),
    )
    if base is not None and len(tasks) == 1:
        raise ValueError(
            f"`dataset_name` {given.dataset_name!r} has no class that `base_model` does not know already: "
            f"{', '.join(base.classes.values())}."
        )
    return tasks[: given.num_tasks]


def _open_folder(folder: RunFolder, arguments: RunArguments, accelerator: Accelerator) -> None:
    training = arguments.training
    if accelerator.is_main_process:
        settings = run_settings(arguments.data, arguments.model, training, arguments.evaluation)
        folder.open(
            settings, overwrite=training.overwrite_output_dir, resume=training.resume_from_checkpoint == LATEST
        )
    accelerator.wait_for_everyone()
    if training.report_to != "none":
        accelerator.init_trackers("logs")


def _setting(
    arguments: RunArguments,
    folder: RunFolder,
    base: ExistingBase | None,
    data: ImageClassificationData,
    tasks: list[Task],
    accelerator: Accelerator,
) -> Setting:
    return Setting(
        output_dir=folder.path,
        base_dir=folder.base if base is None else base.folder,
        base_source=os.fspath(folder.base / "unet") if base is None else base.source,
        has_base=base is not None,
        class_names={**({} if base is None else base.classes), **data.class_names},
        tasks=tuple(tasks),
        model=arguments.model,
        training=arguments.training,
        device=accelerator.device,
        num_images={class_id: data.count(class_id) for class_id in data.class_names},
    )


def _trainer(
    arguments: RunArguments,
    strategy: Strategy,
    data: ImageClassificationData,
    tasks: list[Task],
    folder: RunFolder,
    accelerator: Accelerator,
    stops: _Stops,
    evaluator: Evaluator | None = None,
) -> ContinualTrainer:
    return ContinualTrainer(
        strategy,
        data,
        tasks,
        training=arguments.training,
        folder=folder,
        accelerator=accelerator,
        random_flip=arguments.data.random_flip,
        evaluator=evaluator,
        limit=stops.limit,
        termination=stops.termination,
    )
