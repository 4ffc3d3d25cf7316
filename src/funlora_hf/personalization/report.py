"""Write results.json and the figures of a run of concepts, from what was measured during the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..continual.config import run_settings
from ..continual.strategy_state import memory_reports
from ..continual.trainer import phase_seconds, preparation_seconds
from ..evaluation.figures import loss_curves, sample_grid
from ..evaluation.report import ForgettingError, environment, figures_if_possible, versions
from ..utils.files import read_mapping, write_json
from .evaluator import ConceptEvaluator
from .run_folder import AddedConcepts, ConceptFolder
from .scores import scores_over_time


logger = logging.getLogger(__name__)


def report_run(evaluator: ConceptEvaluator, settings: Iterable[Any]) -> dict[str, Any]:
    """Write results.json and the figures of a run that has ended, print the table, and check that nothing was forgotten.

    Return the contents of results.json.

    Args:
        evaluator: it has evaluated every task.
        settings: the dataclasses of the run's arguments.

    Raises:
        ForgettingError: the strategy promises that learned concepts stay, but one has changed. The files are written first.
    """
    strategy, folder, setting = evaluator.strategy, evaluator.folder, evaluator.setting
    phases, preparation = phase_seconds(folder), sum(preparation_seconds(folder).values())
    before, after, pairs = (evaluator.of_run(name) for name in ("before", "after", "pairs"))
    order = [class_id for task in evaluator.tasks for class_id in task.class_ids]
    losses = {name: record["losses"] for name, record in phases.items()}
    with figures_if_possible():
        loss_curves(losses, folder.figures / "training_loss.png")
        _grids(evaluator, order)
    records = [[evaluator.record(class_id, task) for class_id in setting.seen(task)] for task in evaluator.tasks]
    measured = records if strategy.learning_changes_past_classes else records[-1:]  # each record once
    results = {
        "strategy": strategy.name,
        "strategy_options": setting.training.strategy_options or {},
        "base": setting.arguments.pretrained_model_name_or_path,
        "family": setting.model.family,
        "seed": evaluator.seed,
        "concepts": [setting.concepts[class_id].name for class_id in order],
        "scores": _scores(records),
        "floor": before and _means(before["floor"], str(order[0])),
        "ceiling": before and _means(before["ceiling"], str(order[0])),
        "base_drift": before
        and {
            "before": before["base"],
            "after_task": [
                _without_settings(evaluator.of_run(f"task_{task.index + 1}/base")) for task in evaluator.tasks
            ],
            "with_concept": {
                setting.concepts[class_id].name: one["with_adapter"]
                for class_id, one in zip(order, records[-1], strict=True)
                if one is not None
            },
        },
        "pairs": pairs["pairs"] if pairs else [],
        "zero_forgetting": {"identical": after and after["identical"], "changed": after["changed"] if after else []},
        "added": AddedConcepts(folder).finished(),
        "details": strategy.details(),
        "numbers_per_concept": strategy.numbers_per_concept(),
        "bytes_kept": strategy.memory_report()["persistent"],
        "memory_per_task": memory_reports(folder),
        "training_losses": losses,
        "skipped_steps": sum(record["skipped_steps"] for record in phases.values()),
        "seconds": {
            "training": sum(record["seconds"] for record in phases.values()) + preparation,
            "preparation": preparation,
            "evaluation": sum(one["seconds"] for row in measured for one in row if one is not None),
            "phases": {name: record["seconds"] for name, record in phases.items()},
        },
        "settings": run_settings(*settings),
        "versions": versions(),
        "environment": environment(evaluator.accelerator),
    }
    write_json(folder.results, results)
    _print(results, folder)
    _check(results, folder)
    return results


def report_finished(folder: ConceptFolder) -> dict[str, Any]:
    """Print the results of a finished run again. Returns and raises what `report_run` did."""
    results = read_mapping(folder.results, keys=["zero_forgetting", "scores"])
    print(f"The run in {folder.path} is finished already.\n")
    _print(results, folder)
    _check(results, folder)
    return results


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the scores of a run as a table in Markdown."""
    columns = ("own", "end", "forgetting", "drop")
    lines = ["| score | floor | own time | end | forgetting | drop | ceiling |", "|---|---|---|---|---|---|---|"]
    floor, ceiling = results["floor"] or {}, results["ceiling"] or {}
    for name, found in results["scores"].items():
        cells = [floor.get(name), *(found[column] for column in columns), ceiling.get(name)]
        lines.append(f"| {name} | {' | '.join('' if one is None else f'{one:.3f}' for one in cells)} |")
    return "\n".join(lines)


def _print(results: Mapping[str, Any], folder: ConceptFolder) -> None:
    identical = results["zero_forgetting"]["identical"]
    said = {True: "identical to the bit", False: "CHANGED", None: "not compared"}[identical]
    drift = results["base_drift"]
    change = (drift["after_task"][-1] or drift["after_task"][0]) if drift else None
    same = "not drawn" if change is None else f"{change['same']:.0%} equal to the base's"
    print(
        f"{summary_table(results)}\n\n"
        f"{results['strategy']}: {len(results['concepts'])} concepts, {results['numbers_per_concept']} numbers each, "
        f"{results['bytes_kept']} bytes kept, {results['seconds']['training']:.0f} s of training; first samples at the end: {said}; "
        f"images of base prompts: {same}.\n"
        f"Results: {folder.results}, figures: {folder.figures}"
    )


def _scores(records: Sequence[Sequence[Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Return by score its matrix, `[t][i]` of concept i after task t, and what follows from it; empty without an evaluation."""
    rows = [[one["scores"] for one in row if one is not None] for row in records]
    # Not all prompts tell a background.
    names = [name for name in (rows[-1] or [{}])[-1] if all(name in one for row in rows for one in row)]
    return {name: scores_over_time([[one[name] for one in row] for row in rows]) for name in names}


def _grids(evaluator: ConceptEvaluator, order: Sequence[int]) -> None:
    """Draw a grid for every task: a row for each concept so far."""
    for task in evaluator.tasks:
        names = {c: evaluator.setting.concepts[c].name for c in evaluator.setting.seen(task)}
        images = {name: found for c, name in names.items() if (found := evaluator.images(c, task)) is not None}
        if images:
            sample_grid(
                images,
                evaluator.folder.figures / f"samples_task_{task.index + 1}.png",
                title=f"After concept {task.index + 1}",
            )


def _means(records: Mapping[str, Mapping[str, float]], first: str) -> dict[str, float]:
    """Return the mean over all concepts of each score that the first one has."""
    return {name: fmean(one[name] for one in records.values() if name in one) for name in records[first]}


def _without_settings(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if record is None else {name: value for name, value in record.items() if name != "settings"}


def _check(results: Mapping[str, Any], folder: ConceptFolder) -> None:
    if results["zero_forgetting"]["identical"] is False:
        raise ForgettingError(
            f"Something learned has changed, see zero_forgetting in {folder.results}: {results['zero_forgetting']['changed']}."
        )
