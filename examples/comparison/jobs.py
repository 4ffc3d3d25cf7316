"""Runs many whole runs, several at a time, each in a folder of its own. Resumes where it stopped."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER
from funlora_hf.continual.config import LATEST, run_settings
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.evaluation.report import report_finished
from funlora_hf.run import RunArguments, run
from funlora_hf.utils.files import read_mapping, whole_folder


logger = logging.getLogger(__name__)

LOG = "log.txt"
# How often a terminal shows which task each run is at.
_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        arguments: of the run.
        folder: its output folder.
        label: on the terminal.
        adapters: folder of adapters to take instead of training them, or None.
        after_base: arguments of the run that the base it shares with others was trained without.
    """

    arguments: RunArguments
    folder: Path
    label: str
    adapters: Path | None = None
    after_base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: one of the two is None.

    Args:
        results: contents of its results.json.
        error: type and message of what ended it; the whole of it is in the `log.txt` of its folder.
    """

    results: dict[str, Any] | None = None
    error: str | None = None


def accuracy_text(results: Mapping[str, Any]) -> str:
    """A run's accuracy, for the line at its end."""
    return "no accuracy" if results.get("LA") is None else f"LA {results['LA']:.2f} %"


def loss_text(results: Mapping[str, Any]) -> str:
    """A run's held-out loss, for the line at its end."""
    loss = results["held_out_loss"]["mean"]
    return "no held-out loss" if loss is None else f"held-out loss {loss:.4f}"


def run_jobs(
    jobs: Sequence[Job],
    num_workers: int,
    *,
    description: str,
    shown: Callable[[Mapping[str, Any]], str] | None = accuracy_text,
) -> list[Outcome]:
    """
    Run all jobs; what is finished is not run again, what was interrupted goes on, and no failure loses the others.

    Every run gets a line at its end. On a terminal, a bar shows which runs are at work and how many tasks each has finished.

    Args:
        jobs: in folders that differ.
        num_workers: runs at a time. Each takes an equal share of the cores for torch's threads, unless OMP_NUM_THREADS
            says otherwise.
        description: of the progress bar.
        shown: what its line shows of a run's results besides its seconds; None: nothing.

    Returns:
        The outcomes in the order of the jobs.
    """
    outcomes: dict[int, Outcome] = {}
    with logging_redirect_tqdm(), tqdm(total=len(jobs), desc=description, disable=None) as progress:

        def noted(number: int, outcome: Outcome) -> None:
            outcomes[number] = outcome
            progress.update()
            job, results = jobs[number], outcome.results
            if results is None:
                error = str(outcome.error).rstrip(".")
                logger.error("%s failed, the others go on: %s. See %s.", job.label, error, job.folder / LOG)
            else:
                told = f"{results['seconds']['total']:.0f} s"
                told = told if shown is None else f"{shown(results)}, {told}"
                tqdm.write(f"{description}, {len(outcomes)} of {len(jobs)}: {job.label}: {told}", file=sys.stderr)

        _run_side_by_side(dict(enumerate(jobs)), num_workers, noted, progress)
        # A worker that was killed (out of memory) takes its pool along. One at a time, only the job that it cannot bear
        # is lost.
        for number, job in enumerate(jobs):
            if number not in outcomes:
                _run_side_by_side({number: job}, 1, noted, progress)
                if number not in outcomes:
                    noted(number, Outcome(error="its process was killed, perhaps because memory ran out"))
    return [outcomes[number] for number in range(len(jobs))]


def with_changes(reference: RunArguments, changes: dict[str, Any]) -> RunArguments:
    """Arguments with some replaced, in any of the dataclasses, of a run that goes on where it stopped.

    Raises:
        ValueError: an argument that no dataclass has.
    """
    changes = {"resume_from_checkpoint": LATEST, "overwrite_output_dir": False, **changes}
    parts = {}
    for part in fields(reference):
        value = getattr(reference, part.name)
        own = {key: changes.pop(key) for key in [f.name for f in fields(value)] if key in changes}
        parts[part.name] = replace(value, **own)
    if changes:
        raise ValueError(f"`changes` has {', '.join(map(repr, changes))}, which no run takes as an argument.")
    return RunArguments(**parts)


def start_worker(num_threads: int | None) -> None:
    """Have this worker end with its parent, and compute with that many threads; None leaves them as they are."""
    end_with_parent()
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def threads_per_worker(num_workers: int) -> int | None:
    """Each worker's share of the cores; None where the environment has chosen already."""
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    # A container or a batch system may give fewer than the machine has; not every system can tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_workers)


def end_with_parent() -> None:
    """Have this worker end when the process that started it is gone: killed, it would leave runs that go on unseen, and
    in the way of those that take over their folders."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_side_by_side(
    jobs: dict[int, Job], num_workers: int, noted: Callable[[int, Outcome], None], progress: tqdm
) -> None:
    """Calls `noted` with number and outcome of each job; those of a pool that broke are missing."""
    # Fresh processes: each job then has the random state, the thread count and the accelerator to itself.
    context = multiprocessing.get_context("spawn")
    threads = threads_per_worker(num_workers)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker, initargs=(threads,)) as pool:
        waiting, running = list(jobs), dict[Future[Outcome], int]()
        while waiting or running:
            # No more than there are workers: what was submitted is at work.
            while waiting and len(running) < num_workers:
                number = waiting.pop(0)
                try:
                    running[pool.submit(_run_job, jobs[number])] = number
                except BrokenProcessPool:
                    waiting.clear()
            done, _ = wait(running, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            for future in done:
                number = running.pop(future)
                with contextlib.suppress(BrokenProcessPool):
                    noted(number, future.result())
            progress.set_postfix_str(
                "; ".join(f"{jobs[number].label}: task {_task(jobs[number])}" for number in running.values())
            )


def _task(job: Job) -> int:
    """The task that a run is at, from 1."""
    return 1 + sum(1 for _ in RunFolder(job.folder).evaluation.glob("task_*.json"))


def _run_job(job: Job) -> Outcome:
    job.folder.mkdir(parents=True, exist_ok=True)
    log = open(job.folder / LOG, "a", encoding="utf-8")  # noqa: SIM115 - closed by the next line
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return Outcome(results=_run_or_read(job))
        except Exception as error:
            traceback.print_exc()
            return Outcome(error=f"{type(error).__name__}: {error}")


def _run_or_read(job: Job) -> dict[str, Any]:
    folder, arguments = RunFolder(job.folder), job.arguments
    settings = run_settings(arguments.data, arguments.model, arguments.training, arguments.evaluation)
    overwrite = arguments.training.overwrite_output_dir
    if not overwrite and folder.results.is_file() and read_mapping(folder.results).get("settings") == settings:
        # At once, without the data; raises what the run did that found something forgotten.
        return report_finished(folder)
    if job.adapters is not None and not (job.folder / ADAPTERS_FOLDER).is_dir():
        # A run that finds its adapters finished goes on with sampling.
        folder.open(settings, overwrite=False, resume=True)
        with whole_folder(job.folder / ADAPTERS_FOLDER) as temporary:
            shutil.copytree(job.adapters, temporary, dirs_exist_ok=True)
    run(arguments)
    return read_mapping(folder.results)
