"""Runs every strategy of a comparison with every seed; those that start from a base share one for each seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from comparison.bases import check_seeds, has_own_order, run_on_shared_bases
from comparison.choices import Choice, parse_choices
from comparison.jobs import Job, Outcome, with_changes
from comparison.learning_rates import Candidate, check_rates, choose_learning_rates, rate_argument
from funlora_hf.run import RunArguments
from funlora_hf.utils.checks import check_at_least_one
from funlora_hf.utils.field_types import check_field_types
from funlora_hf.utils.locks import folder_lock


@dataclass
class ComparisonArguments:
    """Which strategies to compare, and how often each is run."""

    strategies: list[str] = field(
        default_factory=lambda: ["funlora", "frozen", "joint"],
        metadata={
            "help": "Strategies to compare: a name, or name:key=value,key=value with options of the strategy, arguments of "
            "its run, or label=... for tables and figures."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds: each strategy runs with all."}
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Choose each strategy's own rate after the base among these, and beyond them where the best is at the edge: "
            "by the flow-matching loss of all classes of the first tasks, on a fifth of the training images, held out, with the first "
            "seed. None: the recipe's. A rate that --strategies names stays."
        },
    )
    num_workers: int = field(default=1, metadata={"help": "Runs at a time; they share the cores."})

    def __post_init__(self) -> None:
        check_field_types(self)
        check_rates(self.learning_rates)
        check_at_least_one("num_workers", self.num_workers)
        check_seeds(self.seeds)
        self.choices()

    def choices(self) -> list[Choice]:
        """The strategies, as they were chosen."""
        return parse_choices(self.strategies)


@dataclass(frozen=True)
class Compared:
    """What the runs of one strategy came to.

    Args:
        choice: the strategy.
        seeds: of its runs.
        outcomes: of its runs, a seed each.
        folders: of its runs, a seed each.
    """

    choice: Choice
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    folders: tuple[Path, ...]

    @property
    def finished(self) -> list[dict]:
        """The results of the runs that did not fail."""
        return [outcome.results for outcome in self.outcomes if outcome.results is not None]


def run_comparison(comparison: ComparisonArguments, reference: RunArguments) -> list[Compared]:
    """
    Run every strategy with every seed; what is finished is not run again, and no failure loses the others.

    Args:
        comparison ([`ComparisonArguments`]): strategies, seeds, workers.
        reference ([`RunArguments`]): what all runs share; its `output_dir` is the folder of the comparison.

    Returns:
        What became of each strategy, in their order.

    Raises:
        ValueError: arguments that a comparison or a strategy's run does not support.
        RuntimeError: no learning rate works for one of the strategies.
        FolderInUseError: another comparison is at work in `output_dir`.
    """
    _check_reference(reference, comparison)
    output_dir, choices = Path(reference.training.output_dir), comparison.choices()
    # All of them now, before anything runs, whatever their rates will be.
    for seed in comparison.seeds:
        for choice in choices:
            _job(reference, choice, seed)
    with folder_lock(output_dir):
        rates = _learning_rates(comparison, reference, choices)
        # All of a seed before the next: a comparison that is stopped early has whole seeds.
        jobs = [
            _job(reference, choice, seed, rates.get(choice.generator().key))
            for seed in comparison.seeds
            for choice in choices
        ]
        outcomes = run_on_shared_bases(jobs, output_dir / "bases", comparison.num_workers, description="runs")
    return [
        Compared(
            choice,
            tuple(comparison.seeds),
            tuple(outcomes[place :: len(choices)]),
            tuple(job.folder for job in jobs[place :: len(choices)]),
        )
        for place, choice in enumerate(choices)
    ]


def _learning_rates(
    comparison: ComparisonArguments, reference: RunArguments, choices: Sequence[Choice]
) -> dict[str, float]:
    """The chosen rates by key of the choice; choices that name a rate have none."""
    if comparison.learning_rates is None:
        return {}
    seed = comparison.seeds[0]
    generators = [choice.generator() for choice in choices if rate_argument(choice.name) not in choice.arguments]
    candidates = [
        Candidate(key, choice.label, _job(reference, choice, seed).arguments)
        for key, choice in {choice.key: choice for choice in generators}.items()
    ]
    return choose_learning_rates(
        candidates,
        comparison.learning_rates,
        Path(reference.training.output_dir),
        comparison.num_workers,
    )


def failures(compared: Sequence[Compared]) -> list[tuple[str, int, str]]:
    """Label, seed and error of every run that failed."""
    return [
        (one.choice.label, seed, outcome.error)
        for one in compared
        for seed, outcome in zip(one.seeds, one.outcomes, strict=True)
        if outcome.error is not None
    ]


def _check_reference(reference: RunArguments, comparison: ComparisonArguments) -> None:
    training = reference.training
    if comparison.learning_rates is not None and has_own_order(reference):
        raise ValueError(
            f"`learning_rates` is {comparison.learning_rates}, and `class_order` or `class_order_seed` is given, expected only one "
            "of them: rates are those of the tasks after a shared base, which needs the dataset's order."
        )
    if training.push_to_hub:
        raise ValueError(
            "`push_to_hub` is set, but the runs of a comparison cannot share a repository: compare, then `funlora push` "
            "the run that you want."
        )
    if training.update_class is not None:
        raise ValueError(
            f"`update_class` is {training.update_class}, expected None: a comparison trains whole runs. Use "
            "continual_train.py."
        )
    options = training.strategy_options
    if options:
        raise ValueError(
            f"`strategy_options` is {options}, which not every strategy takes: give them with the strategy, as in "
            "--strategies name:key=value."
        )


def _job(reference: RunArguments, choice: Choice, seed: int, rate: float | None = None) -> Job:
    argument = rate_argument(choice.name)
    # Another grid may choose another rate: then it is another run.
    key = choice.key if rate is None else f"{choice.key}_{argument}_{rate:g}"
    folder = Path(reference.training.output_dir) / f"seed_{seed}" / key
    changes = {**choice.changes(), "seed": seed, "output_dir": os.fspath(folder)}
    if reference.training.overwrite_output_dir:
        changes |= {"overwrite_output_dir": True, "resume_from_checkpoint": None}
    try:
        after_base = {} if rate is None else {argument: rate}
        label = f"{choice.label}, seed {seed}"
        return Job(with_changes(reference, changes), folder, label, after_base=after_base)
    except TypeError as error:
        raise ValueError(f"`strategies` has {choice.label!r} with a value of the wrong kind: {error}.") from error
    except ValueError as error:
        raise ValueError(f"`strategies` has {choice.label!r}, whose run is not possible: {error}") from error
