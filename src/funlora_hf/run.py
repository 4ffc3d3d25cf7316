"""A whole run from its arguments: data, tasks, strategy, training, evaluation, report. Joins the parts; does no work."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import UNet2DModel

from .adapter_folder import ADAPTERS_FOLDER, adapter_folders
from .continual.config import (
    DIGITS_UNET,
    LATEST,
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    run_settings,
)
from .continual.registry import strategy_class
from .continual.run_folder import RunFolder
from .continual.strategy import Setting, Strategy
from .continual.trainer import ContinualTrainer, phase_seconds
from .data import ImageClassificationData, Task, assign_class_ids, load_image_data, split_into_tasks
from .evaluation.evaluator import RunEvaluator
from .evaluation.figures import accuracy_curve, sample_grid
from .evaluation.figures import layer_importance as layer_importance_figure
from .evaluation.report import accuracy_results, joint_average_accuracies, package_versions, summary_table
from .files import read_json, write_json
from .layer_selection import layer_importance
from .pipeline import FunLoraPipeline
from .tuner.targets import unet_conv_names


logger = logging.getLogger(__name__)


class ForgettingError(RuntimeError):
    """A class or the base has changed although the strategy promises that nothing does."""


@dataclass
class RunArguments:
    """All arguments of a run, checked against each other.

    Raises:
        ValueError: `unet_config` is missing for other images than digits.
    """

    data: DataArguments
    model: ModelArguments
    training: ContinualTrainingArguments
    evaluation: EvaluationArguments

    def __post_init__(self) -> None:
        if self.model.unet_config is not None or self.model.base_model is not None:
            return
        if self.data.dataset_name != "digits" and self.training.update_class is None:
            raise ValueError(
                f"`unet_config` is None, which is the U-Net for 8x8 digits, and `dataset_name` is "
                f"{self.data.dataset_name!r}: give the arguments of a UNet2DModel, take a recipe by --config, or name "
                "an existing generator by --base_model."
            )
        self.model.unet_config = dict(DIGITS_UNET)


@dataclass(frozen=True)
class _Base:
    """A generator that exists already."""

    folder: Path
    source: str
    classes: dict[int, str]
    image_size: int
    channels: int


def run(arguments: RunArguments) -> dict[str, Any] | None:
    """
    Train, evaluate and report; resumes where a run stopped if it is told to.

    Args:
        arguments ([`RunArguments`]): what to do.

    Returns:
        `dict`: the contents of results.json; None after `update_class`, and on all processes but the main one.

    Raises:
        ForgettingError: the samples of an earlier class, or the base, have changed. results.json is written all the
            same.
        ValueError, FileExistsError, FileNotFoundError: arguments that do not fit each other, the data or the folder.
    """
    training = arguments.training
    strategy_cls = strategy_class(training.strategy)
    _check_strategy(strategy_cls, arguments)
    accelerator = _accelerator(training)
    folder = RunFolder(Path(training.output_dir))
    if training.update_class is not None and accelerator.is_main_process:
        folder.check_update()
    base = _existing_base(arguments.model, folder, training)
    data = _load_data(arguments, base)
    tasks = _tasks(arguments, data, base)
    strategy = strategy_cls(_setting(arguments, folder, base, data, tasks, accelerator))
    strategy.check()
    if training.update_class is None:
        _open_folder(folder, arguments, accelerator)
    if folder.results.is_file() and training.update_class is None:
        return _report_finished(folder) if accelerator.is_main_process else None

    evaluator = RunEvaluator(
        data,
        tasks,
        config=arguments.evaluation,
        seed=training.seed,
        folder=folder,
        accelerator=accelerator,
        max_train_steps=training.max_train_steps,
        base_dir=None if training.strategy == "joint" else strategy.setting.base_dir,
    )
    trainer = ContinualTrainer(
        strategy,
        data,
        tasks,
        training=training,
        folder=folder,
        accelerator=accelerator,
        random_flip=arguments.data.random_flip,
        evaluator=evaluator,
    )
    if training.update_class is not None:
        trainer.update_class(training.update_class)
        return None
    trainer.train()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    return _report(arguments, strategy, evaluator, data, tasks, folder, accelerator)


def _check_strategy(strategy_cls: type[Strategy], arguments: RunArguments) -> None:
    if "all_tasks" in strategy_cls.requires and arguments.model.base_model is not None:
        raise ValueError(
            f"`strategy` {strategy_cls.name!r} trains on all tasks at once, so it cannot add classes to `base_model` "
            f"{arguments.model.base_model!r}: leave one of the two out."
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
    if tracked:
        accelerator.init_trackers("logs")
    if accelerator.device.type == "cuda" and training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return accelerator


def _existing_base(model: ModelArguments, folder: RunFolder, training: ContinualTrainingArguments) -> _Base | None:
    """The generator of `base_model`; for `update_class` the one that the run itself has trained."""
    name = model.base_model
    if name is None and training.update_class is not None and folder.base.is_dir():
        name = os.fspath(folder.base)
    if name is None:
        return None
    local = Path(name)
    if local.is_dir():
        path, source = local, os.fspath(local / "unet")
    elif name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`base_model` is {name!r}, but there is no such folder.")
    else:
        path, source = Path(FunLoraPipeline.download(name, revision=model.base_model_revision)), name
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"`base_model` is {name!r}, expected a pipeline folder with a model_index.json, such as the base/ folder of "
            "a run."
        )
    index = read_json(path / "model_index.json")
    config = UNet2DModel.load_config(path, subfolder="unet")
    rows = config.get("num_class_embeds") or 0
    ids = index.get("class_ids") or list(range(rows))
    names = {int(class_id): name for class_id, name in (index.get("id2label") or {}).items()}
    classes = {class_id: names.get(class_id, str(class_id)) for class_id in ids}
    for adapter in adapter_folders(path / ADAPTERS_FOLDER):
        settings = read_json(adapter / "adapter_config.json")
        classes[settings["class_label"]] = settings.get("class_name") or str(settings["class_label"])
    if not rows:
        raise ValueError(
            f"`base_model` {name!r} has a U-Net without a class embedding (`num_class_embeds`), which class vectors "
            "stand in for: train a class-conditional base."
        )
    return _Base(path, source, classes, config["sample_size"], config["in_channels"])


def _load_data(arguments: RunArguments, base: _Base | None) -> ImageClassificationData:
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
    if base is None:
        return data
    return data.with_class_ids(assign_class_ids(list(data.class_names.values()), base.classes))


def _tasks(arguments: RunArguments, data: ImageClassificationData, base: _Base | None) -> list[Task]:
    given = arguments.data
    if arguments.training.update_class is not None:
        return []
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
    return tasks


def _open_folder(folder: RunFolder, arguments: RunArguments, accelerator: Accelerator) -> None:
    training = arguments.training
    if accelerator.is_main_process:
        settings = run_settings(arguments.data, arguments.model, training, arguments.evaluation)
        folder.open(
            settings, overwrite=training.overwrite_output_dir, resume=training.resume_from_checkpoint == LATEST
        )
    accelerator.wait_for_everyone()


def _setting(
    arguments: RunArguments,
    folder: RunFolder,
    base: _Base | None,
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
    )


def _report(
    arguments: RunArguments,
    strategy: Strategy,
    evaluator: RunEvaluator,
    data: ImageClassificationData,
    tasks: list[Task],
    folder: RunFolder,
    accelerator: Accelerator,
) -> dict[str, Any]:
    started = time.perf_counter()
    records = evaluator.records()
    accuracies = accuracy_results([record["accuracies"] for record in records])
    losses = evaluator.held_out_losses(strategy)
    zero_forgetting = evaluator.zero_forgetting(strategy)
    importance = _importance(strategy, folder)
    phases = phase_seconds(folder)
    seconds = {
        "phases": {name: record["seconds"] for name, record in phases.items()},
        "training": sum(record["seconds"] for record in phases.values()),
        "sampling": sum(record["seconds"]["sampling"] for record in records),
        "classifier": sum(record["seconds"]["classifier"] for record in records),
    }
    _figures(arguments, strategy, evaluator, accuracies, importance, tasks, folder)
    seconds["report"] = time.perf_counter() - started
    seconds["total"] = sum(value for value in seconds.values() if not isinstance(value, dict))
    results = {
        "strategy": strategy.name,
        "dataset": data.name,
        "seed": arguments.training.seed,
        "class_order": [class_id for task in tasks for class_id in task.class_ids],
        "class_names": {str(class_id): name for class_id, name in strategy.setting.class_names.items()},
        "tasks": [list(task.class_ids) for task in tasks],
        **accuracies,
        "held_out_loss": {
            "mean": sum(losses.values()) / len(losses) if losses else None,
            "per_class": losses,
        },
        **strategy.parameters_per_class(),
        "layer_importance": {layer: {"mean": m, "std": s} for layer, (m, s) in importance.items()},
        "memory": strategy.memory_report(),
        "seconds": seconds,
        "zero_forgetting": zero_forgetting,
        "settings": run_settings(arguments.data, arguments.model, arguments.training, arguments.evaluation),
        "versions": package_versions(),
        "environment": {
            "python": sys.version.split()[0],
            "device": accelerator.device.type,
            "num_processes": accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
        },
    }
    write_json(folder.results, results)
    shutil.rmtree(folder.checkpoints / "synthetic", ignore_errors=True)
    print(summary_table(results))
    _check_zero_forgetting(zero_forgetting, folder)
    return results


def _importance(strategy: Strategy, folder: RunFolder) -> dict[str, tuple[float, float]]:
    adapters = adapter_folders(folder.path / ADAPTERS_FOLDER)
    if not adapters:
        return {}
    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(strategy.setting.base_dir, subfolder="unet"))
    return layer_importance(adapters, unet_conv_names(unet))


def _figures(
    arguments: RunArguments,
    strategy: Strategy,
    evaluator: RunEvaluator,
    accuracies: dict[str, Any],
    importance: dict[str, tuple[float, float]],
    tasks: list[Task],
    folder: RunFolder,
) -> None:
    names = strategy.setting.class_names
    seen: list[int] = []
    for task in tasks:
        seen += task.class_ids
        images = {names[class_id]: evaluator.synthetic_images(class_id, task) for class_id in seen}
        path = folder.figures / f"samples_task_{task.index + 1}.png"
        sample_grid(images, path, title=f"Samples after task {task.index + 1}")
    if accuracies["A"] is not None:
        classes_seen = [sum(len(task.class_ids) for task in tasks[: t + 1]) for t in range(len(tasks))]
        accuracy_curve(
            accuracies["A"],
            folder.figures / "accuracy.png",
            classes_seen=classes_seen,
            label=strategy.name,
            joint=joint_average_accuracies(arguments.evaluation.joint_results, len(tasks)),
        )
    if importance:
        layer_importance_figure(importance, folder.figures / "layer_importance.png")


def _report_finished(folder: RunFolder) -> dict[str, Any]:
    results = read_json(folder.results)
    print(f"The run in {folder.path} is finished already.\n\n{summary_table(results)}")
    _check_zero_forgetting(results["zero_forgetting"], folder)
    return results


def _check_zero_forgetting(zero_forgetting: dict[str, Any] | None, folder: RunFolder) -> None:
    if zero_forgetting is None:
        return
    if zero_forgetting["classes_changed"] or (
        zero_forgetting["base_sha256_before"] != zero_forgetting["base_sha256_after"]
    ):
        raise ForgettingError(
            f"Something learned has changed, see zero_forgetting in {folder.results}: {zero_forgetting}."
        )
