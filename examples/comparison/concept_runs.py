"""Runs strategies of concepts, several at a time, each in a folder of its own, and chooses their learning rates."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from comparison.concept_choices import Choice
from comparison.jobs import LOG, threads_per_worker
from comparison.learning_rates import Scores
from funlora_hf.utils.files import read_json


# So often a rate beyond the edge is tried.
_EXTENSIONS = 3


@dataclass(frozen=True)
class Job:
    """A run: where, and the arguments of its command."""

    folder: Path
    options: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, choice: Choice, shared: Sequence[str], seed: int, order: Sequence[str]) -> Job:
        """Return the run of a choice with a seed, on concepts in an order."""
        return cls(folder, (*choice.options(), *shared, "--seed", str(seed), "--concept_order", *order))

    def run(self, threads: int | None) -> dict[str, Any] | None:
        """Return the results of the run, which is done if it is not finished, with so many threads; None: it failed."""
        results = self.folder / "results.json"
        if not results.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "funlora_hf.personalization.command", *self.options]
            command += ["--output_dir", str(self.folder), "--resume_from_checkpoint", "latest"]
            environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
            with open(self.folder / LOG, "ab") as log:
                done = subprocess.run(command, stdout=log, stderr=log, check=False, env=environment)  # noqa: S603
            code = done.returncode
            print(f"{self.folder}: {'finished' if code == 0 else f'FAILED, see {self.folder / LOG}'}", flush=True)
        return read_json(results) if results.is_file() else None


def run_all(jobs: dict[Any, Job], workers: int) -> dict[Any, dict[str, Any] | None]:
    """Run jobs, several at a time, which share the cores."""
    run = partial(Job.run, threads=threads_per_worker(workers))
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(run, jobs.values()), strict=True))


def orders(concepts: Sequence[str], seeds: Sequence[int], given: Sequence[str] | None = None) -> dict[int, list[str]]:
    """Return the order of the concepts for each seed: the given one, or the file's for seed 0 and random ones for others.

    Raises:
        ValueError: the given one has a name that is not among the concepts.
    """
    if unknown := [name for name in given or () if name not in concepts]:
        raise ValueError(f"`concept_order` has {unknown[0]!r}, expected some of: {', '.join(concepts)}.")
    if given:
        return {seed: list(given) for seed in seeds}
    return {
        seed: random.Random(seed).sample(concepts, len(concepts)) if seed else list(concepts)  # noqa: S311
        for seed in seeds
    }


def score_of(results: dict[str, Any]) -> str:
    """Return the score by which rates are chosen: the reader's, where the base has one."""
    return next((name for name in ("attr", "clip_i", "dino_i") if name in results["scores"]), "")


def choose_rates(
    choices: Sequence[Choice],
    factors: Sequence[float],
    order: Sequence[str],
    seed: int,
    shared: Sequence[str],
    folder: Path,
    workers: int,
    *,
    tiny: bool,
) -> tuple[list[Choice], dict[str, Any]]:
    """Return the choices with their best rates, and all that was tried; a choice that names a rate keeps it."""

    def with_rate(choice: Choice, factor: float) -> tuple[Choice, str]:
        rate = f"{choice.default_rate(tiny=tiny) * factor:g}"
        return replace(choice, arguments={**choice.arguments, choice.rate_argument: rate}), rate

    # The best is the lowest there: scores with their sign changed, by factor.
    scores = {choice.label: Scores() for choice in choices if choice.rate_argument not in choice.arguments}
    to_try = {label: list(factors) for label in scores}
    for _ in range(1 + _EXTENSIONS):
        jobs: dict[tuple[str, float], Job] = {}
        for choice in choices:
            for factor in to_try.get(choice.label, ()):
                tried, rate = with_rate(choice, factor)
                place = folder / "rates" / choice.label / rate
                jobs[choice.label, factor] = Job.of(place, tried, shared, seed, order[:2])
        for (label, factor), results in run_all(jobs, workers).items():
            if results is not None and results["scores"]:
                scores[label].losses[factor] = -results["scores"][score_of(results)]["end"]
        to_try = {label: found.beyond() for label, found in scores.items()}
    chosen, record = [], {}
    for choice in choices:
        if (found := scores.get(choice.label)) and found.losses:
            best, rate = with_rate(choice, found.best)
            record[choice.label] = {
                "chosen": rate,
                "scores": {with_rate(choice, factor)[1]: -loss for factor, loss in sorted(found.losses.items())},
                "at_the_edge": found.is_at_edge,
            }
            choice = best
        chosen.append(choice)
    return chosen, record
