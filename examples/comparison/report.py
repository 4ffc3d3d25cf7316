"""Writes a comparison as Markdown, CSV, JSON, figures and one HTML page. Reads results and samples; runs nothing."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from seed_tables import as_csv

from comparison.figures import MOST_STRATEGIES, accuracy_figure, cost_figure, forgetting_figure, samples_figure
from comparison.page import Picture, comparison_page
from comparison.runner import Compared, failures
from comparison.tables import Column, Row, as_markdown, as_text, columns_of, flat_rows, rows_of
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.utils.files import read_tensors, whole_file, write_json


logger = logging.getLogger(__name__)

_LEAST_SECONDS = 0.01
_NOTES = (
    'Mean and standard deviation (n - 1) over the seeds; "-" where there is none.',
    "LA: average accuracy over all tasks after the last one; AIA: its mean over all tasks; forgetting: by how much an earlier "
    "task has fallen from its best, on average. The accuracy is that of a classifier trained on the real images of task 1 "
    "and, after it, on the strategy's samples of all classes seen; it is tested on real images. Own classifier: the one that "
    "the strategy trains itself.",
    "Held-out loss: of flow matching, on test images. Frechet distance, precision and recall compare samples with test "
    "images by the features of the network that the heading names; distances by different networks do not compare.",
    "PPC: parameters per class, the numbers kept for each class after the base. Learning rate: of the tasks after the base; joint "
    "training has one for all. The runs that a rate was chosen by do not count as work.",
    "Training images: those that passed through the network, the same ones again included. Training seconds include what "
    "prepares a task, such as sampling what is replayed. Strategies that start from the same base share one for each seed, trained "
    "once: its seconds and images count for each of them. NFE: evaluations of the network for one batch of samples.",
)


def write_comparison(compared: Sequence[Compared], output_dir: Path, *, command: str) -> str:
    """
    Write `comparison.md`, `.csv`, `.json`, `report.html` and `figures/`.

    A figure that nothing was measured for is left out; without matplotlib, all are.

    Args:
        compared: what `run_comparison` returned.
        output_dir: of the comparison.
        command: that made it. Folders before the last part of absolute paths in it are left out of what is written.

    Returns:
        The table for a terminal, with the failed runs below.
    """
    columns = columns_of(compared)
    rows = rows_of(compared, columns)
    failed = [(label, seed, _without_folders(error)) for label, seed, error in failures(compared)]
    details = _details(compared, _without_folders(command))
    below = "".join(f"\nFailed: {label}, seed {seed}: {' '.join(error.split())}\n" for label, seed, error in failed)
    pictures = _pictures(compared, output_dir / "figures")
    page = comparison_page(
        title=_title(compared),
        summary=_summary(compared, failed),
        rows=rows,
        columns=columns,
        notes=_NOTES,
        pictures=pictures,
        failures=failed,
        details=details,
    )
    write_json(output_dir / "comparison.json", _record(rows, columns, failed, details))
    for name, text in (
        ("comparison.csv", as_csv(flat_rows(rows, columns))),
        ("comparison.md", as_markdown(rows, columns) + below),
        ("report.html", page),
    ):
        with whole_file(output_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return as_text(rows, columns) + below


def _record(
    rows: Sequence[Row], columns: Sequence[Column], failed: Sequence[tuple[str, int, str]], details: Mapping[str, str]
) -> dict[str, Any]:
    return {
        **details,
        "columns": {column.key: column.title for column in columns},
        "rows": [
            {
                "label": row.compared.choice.label,
                "strategy": row.compared.choice.name,
                "options": dict(row.compared.choice.options),
                "arguments": dict(row.compared.choice.arguments),
                # Of its runs' folders, a rate that was chosen included.
                "key": row.compared.folders[0].name,
                "seeds": list(row.compared.seeds),
                "mean": row.means,
                "std": row.deviations,
                "per_seed": row.values,
            }
            for row in rows
        ],
        "failed": [{"label": label, "seed": seed, "error": error} for label, seed, error in failed],
    }


def _pictures(compared: Sequence[Compared], folder: Path) -> list[Picture]:
    if len(compared) > MOST_STRATEGIES:
        logger.warning("No figures: they tell %d strategies apart, not %d.", MOST_STRATEGIES, len(compared))
        return []
    makers: list[tuple[str, str, str, Callable[[Sequence[Compared], Path], bool]]] = [
        (
            "accuracy",
            "Accuracy as classes are added",
            "Average accuracy over all classes seen, after each task; bands: the standard deviation over the seeds. PPC: parameters "
            "per class, with the class vector.",
            _draw_accuracy,
        ),
        (
            "forgetting",
            "What is forgotten",
            "Accuracy (%) on the test images of each task, across, by the model after each task, downwards; mean over the "
            "seeds. Where a column darkens downwards, the task is forgotten.",
            _draw_forgetting,
        ),
        (
            "samples",
            "The first task's classes, task after task",
            "Samples of the first task's classes by the model after each task, always from the same noise; one seed.",
            _draw_samples,
        ),
        (
            "cost",
            "What a task costs",
            "Above: seconds of training for each task, with what prepares it. Below: megabytes kept after it. Mean over the "
            "seeds. Joint training pays for all tasks in the first. On a logarithmic scale, a task in which nothing is "
            "trained has no point.",
            _draw_cost,
        ),
    ]
    pictures = []
    for name, title, caption, draw in makers:
        path = folder / f"{name}.png"
        try:
            if draw(compared, path):
                pictures.append(Picture(title, caption, path.read_bytes()))
            else:
                # One of an earlier report does not belong to these runs.
                path.unlink(missing_ok=True)
        except ImportError as error:
            # matplotlib is an extra, and no reason to lose the table.
            logger.warning("No figures: %s", error)
            return []
    return pictures


def _draw_accuracy(compared: Sequence[Compared], path: Path) -> bool:
    averages = _by_label(compared, lambda run: run.get("A"))
    if averages:
        classes_seen = list(itertools.accumulate(len(task) for task in _any_run(compared)["tasks"]))
        accuracy_figure(averages, path, classes_seen=classes_seen, ppc=_parameters_per_class(compared))
    return bool(averages)


def _parameters_per_class(compared: Sequence[Compared]) -> dict[str, float]:
    """Of the strategies that have them, by label."""
    of_runs = _by_label(compared, lambda run: run.get("parameters_per_class_with_vector"))
    return {label: fmean(values) for label, values in of_runs.items()}


def _draw_forgetting(compared: Sequence[Compared], path: Path) -> bool:
    matrices = _by_label(compared, lambda run: run.get("accuracy_matrix"))
    means = {
        label: [[fmean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*of_seeds, strict=True)]
        for label, of_seeds in matrices.items()
    }
    if means:
        forgetting_figure(means, path)
    return bool(means)


def _draw_cost(compared: Sequence[Compared], path: Path) -> bool:
    seconds = _by_label(compared, _seconds_per_task)
    memory = _by_label(compared, lambda run: [task["persistent"] for task in run.get("memory_per_task") or []])
    if seconds or memory:
        cost_figure(_means(seconds), _means(memory), path)
    return bool(seconds or memory)


def _seconds_per_task(run: Mapping[str, Any]) -> list[float]:
    """Of training; a task in which only the clock was looked at has none."""
    per_task = (run.get("seconds") or {}).get("training_per_task") or []
    return [value if value > _LEAST_SECONDS else 0.0 for value in per_task]


def _draw_samples(compared: Sequence[Compared], path: Path) -> bool:
    samples = {}
    for one in compared:
        for outcome, folder in zip(one.outcomes, one.folders, strict=True):
            path_of_samples = RunFolder(folder).samples
            if outcome.results is not None and path_of_samples.is_file():
                per_task = _first_classes(outcome.results, path_of_samples)
                if per_task:
                    samples[one.choice.label] = per_task
                    break
    if samples:
        samples_figure(samples, path)
    return bool(samples)


def _first_classes(results: Mapping[str, Any], path: Path) -> list[dict[str, torch.Tensor]]:
    """Samples of the first task's classes after each task, by the name of the class."""
    names = results.get("class_names") or {}
    saved = read_tensors(path, remedy="delete it")
    per_task = []
    for task in range(1, len(results["tasks"]) + 1):
        keys = {names.get(str(c), str(c)): f"task_{task}/class_{c}" for c in results["tasks"][0]}
        per_task.append({name: saved[key] for name, key in keys.items() if key in saved})
    return list(itertools.takewhile(bool, per_task))


def _by_label(compared: Sequence[Compared], value: Callable[[Mapping[str, Any]], Any]) -> dict[str, list[Any]]:
    """The values of each strategy's finished runs; strategies that were not measured in all of them are left out."""
    values = {one.choice.label: [value(run) for run in one.finished] for one in compared}
    return {label: of_runs for label, of_runs in values.items() if of_runs and all(of_runs)}


def _means(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    return {label: [fmean(of_task) for of_task in zip(*of_runs, strict=True)] for label, of_runs in values.items()}


def _any_run(compared: Sequence[Compared]) -> Mapping[str, Any]:
    return next((run for one in compared for run in one.finished), {})


def _title(compared: Sequence[Compared]) -> str:
    dataset = _any_run(compared).get("dataset")
    on = f" on {Path(dataset).name}" if dataset else ""
    return f"Continual learning{on}: {len(compared)} {'strategy' if len(compared) == 1 else 'strategies'}"


def _summary(compared: Sequence[Compared], failed: Sequence[Any]) -> str:
    run, seeds = _any_run(compared), compared[0].seeds
    parts = []
    if run:
        classes = sum(len(task) for task in run["tasks"])
        parts.append(f"{classes} classes in {len(run['tasks'])} tasks")
    parts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}")
    parts.append(f"{len(compared) * len(seeds) - len(failed)} of {len(compared) * len(seeds)} runs finished")
    return "; ".join(parts) + "."


def _details(compared: Sequence[Compared], command: str) -> dict[str, str]:
    run = _any_run(compared)
    environment = run.get("environment", {})
    return {
        "command": command,
        "seeds": ", ".join(map(str, compared[0].seeds)),
        "machine": _machine(),
        "trained on": environment.get("device", "-"),
        "threads of a run": str(environment.get("num_threads", "-")),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()) or "-",
    }


def _machine() -> str:
    """What kind of machine this is, not which."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        processor = named.group(1).strip() if named else processor
    parts = [processor, f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _without_folders(text: str) -> str:
    """Text with only the last part of each absolute path, since the rest is private."""
    return re.sub(r"(?<![\w./~-])/(?:[^/\s'\"=,:]+/)*(?=[^/\s'\"])", "", text)
