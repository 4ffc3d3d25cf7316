"""Chooses a learning rate for each of several runs, on training images only."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.bases import run_on_shared_bases
from comparison.jobs import Job, loss_text, with_changes
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.run import RunArguments
from funlora_hf.utils.files import write_json


logger = logging.getLogger(__name__)

# Of a run of which only the held-out loss is wanted.
CHEAP_EVALUATION = {
    "evaluation": True,
    "num_samples_per_class": 1,
    "num_probe_samples": 1,
    "classifier_epochs": 1,
    "image_quality": "none",
}
# Shares of the training images of each class on which no run of the grid trains.
VALIDATION_FRACTION = 0.2
# Tasks that a run of the grid learns, the base's among them. A strategy that changes past classes needs two after the base: in the
# second it first changes what it learned itself, and ways to merge differ. Otherwise the later classes are like the first.
NUM_TASKS = {True: 3, False: 2}
# Rates beyond the grid that are tried for a run whose best one is at its edge.
MOST_WIDENINGS = 6
# That a run takes.
HIGHEST_RATE = 1e3
RATES_FILE = "learning_rates.json"


@dataclass(frozen=True)
class Candidate:
    """What gets a learning rate.

    Args:
        key: names its folder.
        label: on the terminal.
        arguments: of its run; the rate is still to be chosen.
    """

    key: str
    label: str
    arguments: RunArguments

    @property
    def argument(self) -> str:
        """The argument that is its rate."""
        return rate_argument(self.arguments.training.strategy)


@dataclass
class Scores:
    """Held-out loss by rate, as far as it is known; infinite for a run that failed."""

    losses: dict[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The rate of the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest of at least two."""
        return len(self.losses) > 1 and self.best in (min(self.losses), max(self.losses))

    def beyond(self) -> list[float]:
        """The next rate outwards, if the best one is at the edge and a run takes it."""
        if not self.is_at_edge:
            return []
        rates = sorted(self.losses)
        # A new edge keeps the grid's own ratio.
        edge, inner = (rates[0], rates[1]) if self.best == rates[0] else (rates[-1], rates[-2])
        rate = float(f"{edge * edge / inner:.3g}")
        return [rate] if rate <= HIGHEST_RATE else []


def rate_argument(strategy: str) -> str:
    """The argument that is the learning rate of a strategy's later tasks."""
    return f"{strategy_class(strategy).prefix}_learning_rate"


def check_rates(rates: Iterable[float] | None, argument: str = "learning_rates") -> None:
    """Raise a ValueError that names the argument unless all are finite numbers above 0."""
    for rate in rates or ():
        if not 0 < rate < math.inf:
            raise ValueError(f"`{argument}` has {rate:g}, expected numbers above 0.")


def choose_learning_rates(
    candidates: Sequence[Candidate], rates: Sequence[float], output_dir: Path, num_workers: int
) -> dict[str, float]:
    """The rate of each candidate with the lowest held-out loss, by key; all as `search_learning_rates`, whose losses are written to
    `learning_rates.json`."""
    scores = search_learning_rates(candidates, rates, output_dir, num_workers)
    write_json(output_dir / RATES_FILE, rates_record(candidates, scores))
    return {key: of_key.best for key, of_key in scores.items()}


def search_learning_rates(
    candidates: Sequence[Candidate], rates: Sequence[float], output_dir: Path, num_workers: int
) -> dict[str, Scores]:
    """
    The held-out loss of each candidate by rate.

    Every run learns the first task after the base, and the second if the strategy changes past classes, on four fifths of the
    training images; its loss is that of flow matching on the last fifth, as the mean over all classes seen, the base's too, so
    that what a rate makes a strategy forget counts. Where the best rate is at the edge, rates beyond it are tried. Runs that are
    finished are not run again.

    Args:
        candidates: keys differ.
        rates: to begin with.
        output_dir: runs go to `learning_rates/<key>/<rate>` in it, their bases to `bases/`.
        num_workers: runs at a time.

    Returns:
        The scores by key; at least one loss of each candidate is finite.

    Raises:
        ValueError: a candidate has no held-out loss.
        RuntimeError: every run of a candidate failed.
    """
    for candidate in candidates:
        training = candidate.arguments.training
        if not strategy_class(training.strategy, training.strategy_options).has_held_out_loss:
            raise ValueError(
                f"`learning_rates` are given, but {candidate.label} has no held-out loss to choose by: name its rate in `strategies`, such as "
                f"{candidate.argument}=1e-4."
            )
    scores = {candidate.key: Scores() for candidate in candidates}
    wanted = {candidate.key: sorted(set(rates)) for candidate in candidates}
    for _ in range(1 + MOST_WIDENINGS):
        asked = [(candidate, rate) for candidate in candidates for rate in wanted[candidate.key]]
        if not asked:
            break
        jobs = [_job(candidate, rate, output_dir / "learning_rates") for candidate, rate in asked]
        outcomes = run_on_shared_bases(
            jobs, output_dir / "bases", num_workers, description="learning rates", shown=loss_text
        )
        for (candidate, rate), outcome in zip(asked, outcomes, strict=True):
            scores[candidate.key].losses[rate] = _loss(outcome.results)
        wanted = {key: of_key.beyond() for key, of_key in scores.items()}
    for candidate in candidates:
        if math.isinf(min(scores[candidate.key].losses.values())):
            raise RuntimeError(
                f"No learning rate of {candidate.label} gives a finite held-out loss: see the log.txt of its runs in "
                f"{output_dir / 'learning_rates' / candidate.key}."
            )
        if scores[candidate.key].is_at_edge:
            logger.warning(
                "%s: the best learning rate, %g, is at the edge of those tried: a rate beyond it may be better.",
                candidate.label,
                scores[candidate.key].best,
            )
    return scores


def rates_record(candidates: Sequence[Candidate], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """What `learning_rates.json` tells of a search."""
    return {
        "criterion": "held-out flow-matching loss, mean over all classes of the first tasks",
        "num_tasks": {candidate.key: _num_tasks(candidate) for candidate in candidates},
        "seed": candidates[0].arguments.training.seed if candidates else None,
        "arguments": {candidate.key: candidate.argument for candidate in candidates},
        "chosen": {key: of_key.best for key, of_key in scores.items()},
        "at_edge": [key for key, of_key in scores.items() if of_key.is_at_edge],
        "losses": {
            key: {f"{rate:g}": None if math.isinf(loss) else loss for rate, loss in sorted(of_key.losses.items())}
            for key, of_key in scores.items()
        },
    }


def _job(candidate: Candidate, rate: float, folder: Path) -> Job:
    path = folder / candidate.key / f"{rate:g}"
    arguments = candidate.arguments
    changes: dict[str, Any] = {**CHEAP_EVALUATION, "output_dir": str(path)}
    changes["num_tasks"] = _num_tasks(candidate)
    changes["validation_fraction"] = arguments.data.validation_fraction or VALIDATION_FRACTION
    strategy = arguments.training.strategy
    # The strategy's own classifier has no part in the generator, except where it guides the drawing.
    if strategy != "ddgr" and "classifier_train_steps" in strategy_class(strategy).known_options():
        changes["strategy_options"] = {**(arguments.training.strategy_options or {}), "classifier_train_steps": 1}
    label, own = f"{candidate.label}, learning rate {rate:g}", {candidate.argument: rate}
    return Job(with_changes(arguments, changes), path, label, after_base=own)


def _num_tasks(candidate: Candidate) -> int:
    return NUM_TASKS[strategy_class(candidate.arguments.training.strategy).learning_changes_past_classes]


def _loss(results: dict[str, Any] | None) -> float:
    loss = None if results is None else results["held_out_loss"]["mean"]
    return math.inf if loss is None or not math.isfinite(loss) else loss
