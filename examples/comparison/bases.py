"""Runs that start from the same base share one, which is trained once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from comparison.jobs import LOG, Job, Outcome, accuracy_text, run_jobs, with_changes
from funlora_hf.continual.config import ContinualTrainingArguments, EvaluationArguments, ModelArguments
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.run import RunArguments


# Besides those of adapters and of the evaluation, what does not change the base that a run trains.
_WITHOUT_EFFECT = (
    *("strategy", "strategy_options", "class_batches", "checkpointing_steps", "checkpoints_total_limit"),
    *("time_limit_minutes", "report_to"),
)
_OF_THE_FOLDER = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise a ValueError unless the `seeds` of several runs differ, and there is at least one."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"`seeds` is {list(seeds)}, expected different numbers, at least one.")


def run_on_shared_bases(
    jobs: Sequence[Job],
    folder: Path,
    num_workers: int,
    *,
    description: str,
    shown: Callable[[Mapping[str, Any]], str] = accuracy_text,
) -> list[Outcome]:
    """
    Run jobs as `run_jobs` does; those that would train the same base start from one of a run of its own.

    What they learn is the same to the bit. The results returned count seconds and images of the base as if each run had
    trained it; the `results.json` of a run does not.

    Args:
        jobs: in folders that differ.
        folder: of the runs that train bases.
        num_workers: runs at a time.
        description: of the progress bar.
        shown: of a run's results, in its line.

    Returns:
        The outcomes in the order of the jobs. A job whose base failed has its error.
    """
    base_of = {number: _base_job(job, folder) for number, job in enumerate(jobs) if trains_base(job.arguments)}
    bases = {base.folder: base for base in base_of.values()}
    trained = run_jobs(list(bases.values()), num_workers, description="bases", shown=None) if bases else []
    base_outcomes = dict(zip(bases, trained, strict=True))
    outcomes, started = dict[int, Outcome](), dict[int, Job]()
    for number, job in enumerate(jobs):
        if number not in base_of:
            started[number] = _started(job, None)
        elif (error := base_outcomes[base_of[number].folder].error) is not None:
            log = base_of[number].folder / LOG
            outcomes[number] = Outcome(error=f"its base failed: {error.rstrip('.')}. See {log}.")
        else:
            started[number] = _started(job, base_of[number])
    ended = run_jobs(list(started.values()), num_workers, description=description, shown=shown) if started else []
    for number, outcome in zip(started, ended, strict=True):
        base = base_outcomes[base_of[number].folder].results if number in base_of else None
        outcomes[number] = outcome if base is None else _with_cost_of(base, outcome)
    return [outcomes[number] for number in range(len(jobs))]


def trains_base(arguments: RunArguments) -> bool:
    """Whether a run trains a base that others can start from."""
    free = arguments.model.base_model is None and not has_own_order(arguments)
    strategy = strategy_class(arguments.training.strategy, arguments.training.strategy_options)
    return free and not strategy.trains_own_base and "all_tasks" not in strategy.requires


def has_own_order(arguments: RunArguments) -> bool:
    """Whether the classes have another order than the dataset's: in it, a run on a given base would count them otherwise."""
    return arguments.data.class_order_seed is not None or arguments.data.class_order is not None


def _base_job(job: Job, folder: Path) -> Job:
    """The run that trains only the base of a job, in a folder named by what shapes the base."""
    arguments = job.arguments
    plain = {one.name: one.default for one in fields(ModelArguments) if one.name != "unet_config"}
    plain |= {one.name: one.default for one in fields(EvaluationArguments)}
    plain |= {
        one.name: one.default
        for one in fields(ContinualTrainingArguments)
        if one.name.startswith("adapter_") or one.name in _WITHOUT_EFFECT
    }
    kept = {name: getattr(arguments.training, name) for name in _OF_THE_FOLDER}
    base = with_changes(arguments, {**plain, **kept, "strategy": "frozen", "num_tasks": 1, "evaluation": False})
    seed = arguments.training.seed
    path = folder / f"seed_{seed}_{_digest(base)}"
    return Job(with_changes(base, {**kept, "output_dir": os.fspath(path)}), path, f"base, seed {seed}")


def _digest(arguments: RunArguments) -> str:
    """Of all settings but the folder's. Only what differs from its default counts: later versions have more settings."""
    given = {
        one.name: value
        for part in (arguments.data, arguments.model, arguments.training)
        for one in fields(part)
        if one.name not in _OF_THE_FOLDER and (value := getattr(part, one.name)) != one.default
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]


def _started(job: Job, base: Job | None) -> Job:
    """The job as it runs: on its base, with what comes after it."""
    changes = {name: getattr(job.arguments.training, name) for name in _OF_THE_FOLDER} | dict(job.after_base)
    if base is not None:
        changes["base_model"] = os.fspath(RunFolder(base.folder).base)
    return replace(job, arguments=with_changes(job.arguments, changes))


def _with_cost_of(base: Mapping[str, Any], outcome: Outcome) -> Outcome:
    """The outcome of a run with the seconds and images of its base, in task 1."""
    if outcome.results is None:
        return outcome
    results = deepcopy(outcome.results)
    results["seconds"]["training"] += base["seconds"]["training"]
    results["seconds"]["total"] += base["seconds"]["training"]
    results["seconds"]["training_per_task"][0] += base["seconds"]["training_per_task"][0]
    results["training_images_per_task"][0] += base["training_images_per_task"][0]
    return Outcome(results=results)
