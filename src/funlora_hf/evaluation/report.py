"""Write results.json and the figures of a run, from what was measured during the run. Trains nothing of the run."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_folders, class_in_name
from ..continual.added_classes import AddedClasses
from ..continual.base import BASE_PHASE
from ..continual.config import run_settings
from ..continual.run_folder import RunFolder
from ..continual.strategy import Strategy
from ..continual.strategy_state import memory_reports
from ..continual.trainer import per_task, phase_seconds, preparation_seconds
from ..data.tasks import Task
from ..layer_selection import LayerImportance, conv_layers, layer_importance
from ..utils.files import read_mapping, write_json
from .evaluator import RunEvaluator
from .figures import accuracy_curve, drift_curves, loss_curves, sample_grid
from .figures import layer_importance as layer_importance_figure
from .metrics import continual_scores
from .tables import summary_table, what_next


logger = logging.getLogger(__name__)

# Each grid shows all classes up to its task: for many tasks, drawing all grids would take as long as the training.
MOST_SAMPLE_GRIDS = 20

_PACKAGES = (
    "funlora-hf",
    "torch",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "transformers",
    "torchdiffeq",
    "safetensors",
    "huggingface-hub",
)


def accuracy_results(rows: Sequence[Sequence[float] | None]) -> dict[str, Any]:
    """Return `accuracy_matrix`, `A`, `LA`, `AIA` and `forgetting` of results.json, all in %, from the rows of the matrix.

    A row is None if nothing was measured after the task; if the last row is None, so are all results.
    """
    nothing = dict.fromkeys(("accuracy_matrix", "A", "LA", "AIA", "forgetting"))
    if rows[-1] is None:
        return nothing
    matrix = [list(row) for row in rows if row is not None]
    if len(matrix) < len(rows):
        averages = [None if row is None else fmean(row) for row in rows]
        return {**nothing, "accuracy_matrix": list(rows), "A": averages, "LA": averages[-1]}
    return {"accuracy_matrix": matrix, **continual_scores(matrix)}


def recognised(drift: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return `recognised` of results.json: % of the samples after the last task that a classifier of all real training images finds
    to be of their class, by class and as the mean over them. None: `RunEvaluator.drift` did not measure that task."""
    last = drift and drift["by_task"][-1]
    if not last:
        return None
    shares = {class_id: one["accuracy"] for class_id, one in last.items()}
    return {"mean": fmean(shares.values()), "per_class": shares}


def joint_average_accuracies(path: str | None, num_tasks: int) -> list[float] | None:
    """Return A_1..A_T of a joint run; None without one, and, with a warning, if it has no results for `num_tasks` tasks."""
    if path is None:
        return None
    averages = read_mapping(Path(path)).get("A") if Path(path).is_file() else None
    if [isinstance(average, (int, float)) for average in averages or ()] != [True] * num_tasks:
        logger.warning(
            "`joint_results` is %r, which has no accuracies after %d tasks: they are not drawn.", path, num_tasks
        )
        return None
    return averages


class ForgettingError(RuntimeError):
    """A class or the base has changed, although the strategy promises that nothing does."""


def report_run(evaluator: RunEvaluator, *, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write results.json and the figures of a run that has ended, print the table, and check that nothing was forgotten.

    Returns the contents of results.json. `settings` are all arguments of the run, by dataclass.

    Raises:
        ForgettingError: the strategy promises that learned classes stay, but one has changed. The files are written first.
    """
    started = time.perf_counter()
    strategy, tasks, folder = evaluator.strategy, evaluator.tasks, evaluator.folder
    zero_forgetting = evaluator.zero_forgetting()
    importance = _importance(strategy)
    # Records of earlier versions have none.
    phases = phase_seconds(folder)
    losses = {name: record["losses"] for name, record in phases.items() if "losses" in record}
    evaluated = _evaluated(evaluator)
    with figures_if_possible():
        if importance:
            layer_importance_figure(importance, folder.figures / "layer_importance.png")
        if losses:
            loss_curves(losses, folder.figures / "training_loss.png")
    results = {
        "strategy": strategy.name,
        "strategy_options": strategy.setting.training.strategy_options or {},
        **({"outside_data": True} if strategy.outside_data else {}),
        "peft_method": strategy.method_name,
        "dataset": evaluator.data.name,
        "seed": evaluator.seed,
        "class_order": list(strategy.setting.seen(tasks[-1])),
        "class_names": {str(class_id): name for class_id, name in strategy.setting.class_names.items()},
        "tasks": [list(task.class_ids) for task in tasks],
        **evaluated,
        **strategy.parameters_per_class(),
        "layer_importance": {layer: of_layer._asdict() for layer, of_layer in importance.items()},
        "memory": strategy.memory_report(),
        "memory_per_task": memory_reports(folder),
        "training_images_per_task": per_task(phases, "images", [0] * len(tasks)),
        # Records of earlier versions have none.
        "skipped_steps": sum(record.get("skipped_steps", 0) for record in phases.values()),
        "training_losses": losses,
        "ema_decay_reached": _decays(phases),
        "seconds": _seconds(evaluator, time.perf_counter() - started),
        "zero_forgetting": zero_forgetting,
        "added": AddedClasses(folder).finished(),
        "settings": settings,
        "versions": versions(),
        "environment": environment(evaluator.accelerator),
    }
    _write(results, evaluator)
    _check_zero_forgetting(zero_forgetting, folder)
    return results


def report_evaluation(evaluator: RunEvaluator) -> dict[str, Any]:
    """Rewrite the results of an evaluation in the results.json and figures of a finished run, and print the table.

    Returns the contents of results.json.
    """
    started = time.perf_counter()
    results = read_mapping(evaluator.folder.results, keys=("settings", "zero_forgetting"))
    results |= _evaluated(evaluator)
    results["seconds"] = _seconds(evaluator, time.perf_counter() - started)
    results["settings"] |= run_settings(evaluator.config)
    _write(results, evaluator)
    for class_id, record in results.get("added", {}).items():  # versions before it have none
        print(
            f"class {class_id} ({record['class_name']}) was added and is not evaluated: the run's data set has no test images of it"
        )
    return results


def report_finished(folder: RunFolder) -> dict[str, Any]:
    """Print the results of a finished run again. Returns and raises what `report_run` did."""
    results = read_mapping(folder.results, keys=["zero_forgetting"])
    # They are still there if the run was killed after it wrote its results.
    folder.forget_samples()
    print(
        f"The run in {folder.path} is finished already.\n\n{summary_table(results)}\n\n{what_next(results, folder.path)}"
    )
    _check_zero_forgetting(results["zero_forgetting"], folder)
    return results


def execution_order(base: Path) -> list[str]:
    """Return the names of the Conv2d of a pipeline folder's U-Net in order of execution, from its configuration alone."""
    with torch.device("meta"):
        return conv_layers(UNet2DModel.from_config(UNet2DModel.load_config(base, subfolder="unet")))


def tasks_with_grid(tasks: Sequence[Task]) -> list[Task]:
    """Choose the tasks after which a grid shows the samples of all classes: at most 20, evenly spaced, with the first and the last."""
    count = min(len(tasks), MOST_SAMPLE_GRIDS)
    return [tasks[index] for index in np.linspace(0, len(tasks) - 1, count).round().astype(int)]


def _decays(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the decay of the moving average in the last step of the base, and of the first adapter or later phase."""
    found: dict[str, float] = {}
    for name, record in phases.items():
        if "ema_decay" in record:
            found.setdefault("base" if name == BASE_PHASE else "adapter", record["ema_decay"])
    return found


def _evaluated(evaluator: RunEvaluator) -> dict[str, Any]:
    """Return the part of results.json that evaluation gives, and draw its figures; None where nothing was measured."""
    strategy, tasks, records = evaluator.strategy, evaluator.tasks, evaluator.records()
    sampled = records[-1] is not None
    accuracies = accuracy_results([None if record is None else record["accuracies"] for record in records])
    own = accuracy_results([None if record is None else record.get("own_classifier") for record in records])
    losses = evaluator.held_out_losses() if sampled else {}
    measures: dict[str, Callable[[], Any]] = {
        "accuracy of real images": evaluator.real_accuracy,
        "image quality": evaluator.image_quality,
        "drift": evaluator.drift,
    }
    measured: dict[str, Any] = {}
    for name, measure in measures.items() if sampled else ():
        try:
            measured[name] = measure()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            # A missing extra or a failed download or training must not lose the results of days.
            logger.warning("No %s: %s", name, error)
    drift = measured.get("drift")
    with figures_if_possible():
        _figures(evaluator, accuracies)
        if drift is not None:
            classes = [task.class_ids for task in tasks]
            drift_curves(drift["by_task"], drift["real"], evaluator.folder.figures / "drift.png", tasks=classes)
    return {
        **accuracies,
        "LA_real": measured.get("accuracy of real images"),
        # Records of earlier versions have none.
        "class_accuracy": records[-1] and records[-1].get("class_accuracies"),
        "held_out_loss": {"mean": sum(losses.values()) / len(losses) if losses else None, "per_class": losses},
        # The losses of classes that never change are the same after every task.
        "held_out_loss_by_task": [
            record
            and (
                record.get("held_out_losses")
                or {c: losses[c] for c in map(str, strategy.setting.seen(task)) if c in losses}
            )
            for task, record in zip(tasks, records, strict=True)
        ],
        "own_classifier": None if own["A"] is None else own,
        "image_quality": measured.get("image quality"),
        "drift": drift,
        "recognised": recognised(drift),
        "nfe": evaluator.nfe() if sampled else None,
    }


def _write(results: dict[str, Any], evaluator: RunEvaluator) -> None:
    folder = evaluator.folder
    evaluator.keep_first_samples()
    write_json(folder.results, results)
    folder.forget_samples()
    print(f"{summary_table(results)}\n\n{what_next(results, folder.path)}")


def versions() -> dict[str, str]:
    """Return the versions of the packages that results may depend on."""
    return {name: version(name) for name in _PACKAGES}


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return on what a run has run."""
    return {
        "python": sys.version.split()[0],
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
    }


@contextmanager
def figures_if_possible() -> Iterator[None]:
    """Warn if the block cannot draw: matplotlib is an extra, and must not lose the results of days."""
    try:
        yield
    except ImportError as error:
        logger.warning("No figures: %s", error)


def _seconds(evaluator: RunEvaluator, report: float) -> dict[str, Any]:
    records = [record["seconds"] for record in evaluator.records() if record is not None]
    phases, preparation = phase_seconds(evaluator.folder), preparation_seconds(evaluator.folder)
    prepared = [preparation.get(index, 0.0) for index in range(len(evaluator.tasks))]
    parts = {
        "training": sum(record["seconds"] for record in phases.values()) + sum(preparation.values()),
        "sampling": sum(record["sampling"] for record in records),
        "classifier": sum(record["classifier"] for record in records),
        "report": report,
    }
    return {
        **parts,
        "total": sum(parts.values()),
        "phases": {name: record["seconds"] for name, record in phases.items()},
        "preparation_per_task": prepared,
        "training_per_task": per_task(phases, "seconds", prepared),
    }


def _importance(strategy: Strategy) -> dict[str, LayerImportance]:
    found = adapter_folders(strategy.setting.output_dir / ADAPTERS_FOLDER)
    # Without those that were added to the run.
    adapters = [path for path in found if class_in_name(path.name) in strategy.setting.class_names]
    if not adapters or strategy.method_name == "vanilla_add":
        # Importance is the distance of A and B from one, where all methods except vanilla LoRA start.
        return {}
    return layer_importance(adapters, order=execution_order(strategy.setting.base_dir))


def _figures(evaluator: RunEvaluator, accuracies: Mapping[str, Any]) -> None:
    setting, tasks, folder = evaluator.strategy.setting, evaluator.tasks, evaluator.folder
    for task in tasks_with_grid(evaluator.sampled()):
        images = {setting.class_names[c]: evaluator.synthetic_images(c, task) for c in setting.seen(task)}
        path = folder.figures / f"samples_task_{task.index + 1}.png"
        sample_grid(images, path, title=f"Samples after task {task.index + 1}")
    if accuracies["AIA"] is not None:
        accuracy_curve(
            accuracies["A"],
            folder.figures / "accuracy.png",
            classes_seen=list(itertools.accumulate(len(task.class_ids) for task in tasks)),
            label=evaluator.strategy.name,
            joint=joint_average_accuracies(evaluator.config.joint_results, len(tasks)),
        )


def _check_zero_forgetting(zero_forgetting: dict[str, Any] | None, folder: RunFolder) -> None:
    if zero_forgetting is not None and (
        zero_forgetting["classes_changed"]
        or zero_forgetting["base_sha256_before"] != zero_forgetting["base_sha256_after"]
    ):
        raise ForgettingError(
            f"Something learned has changed, see zero_forgetting in {folder.results}: {zero_forgetting}."
        )
