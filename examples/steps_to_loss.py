"""Makes the table "steps to a loss": the held-out loss of the classes after the base by training steps, for several settings.

    python examples/steps_to_loss.py --config digits_2-2 --seeds 0 1 2 --steps 25 50 75 100 150 300 --output_dir outputs/steps_to_loss \
        --settings "before: adapter_learning_rate=2e-2,adapter_alpha_rate=1" "recipe:"

Trains one base per seed, by the recipe, and on it every later class with each setting and each number of steps: a setting is "label:
argument=value,argument=value", with what differs from the recipe after the base. The loss is that of flow matching on the test images, or on
the training images that `--validation_fraction` holds back. Writes `steps_to_loss.json`, `steps_to_loss.md` and `figures/` into `--output_dir`.
Started again with the same arguments, it runs what is not finished. All arguments of `continual_train.py` hold for every run; `--help` lists
them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from steps_report import SAMPLES, write_report

from comparison.bases import check_seeds, has_own_order, run_on_shared_bases
from comparison.choices import NO_CHOICE, check_different, folder_key, split_entry, yaml_value
from comparison.jobs import Job, loss_text, with_changes
from comparison.learning_rates import CHEAP_EVALUATION
from funlora_hf.continual.config import ContinualTrainingArguments, ModelArguments
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.run import RunArguments
from funlora_hf.train import ERRORS, parse
from funlora_hf.utils.checks import check_at_least_one
from funlora_hf.utils.field_types import check_field_types
from funlora_hf.utils.locks import folder_lock


# Those that the table sets, and caps on them.
_STEPS = {"adapter_train_steps", "adapter_epochs", "max_train_steps"}
_CHANGEABLE = [
    one.name
    for part in (ModelArguments, ContinualTrainingArguments)
    for one in fields(part)
    # The base is shared.
    if one.name not in {"unet_config"} | _STEPS | NO_CHOICE and not one.name.startswith("base_")
]


@dataclass(frozen=True)
class Setting:
    """What differs from the recipe after the base: argument -> value."""

    label: str
    changes: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names its folders; different changes have different keys."""
        return folder_key("recipe", self.changes)

    @classmethod
    def parse(cls, entry: str) -> Setting:
        """Read "label: argument=value,argument=value"; raises a ValueError for another form or an argument that it cannot change."""
        label, texts = split_entry(entry, "settings")
        if not label.strip():
            raise ValueError(
                f"`settings` has {entry!r} without a label, expected 'label: argument=value': give it one."
            )
        for key in texts:
            if key not in _CHANGEABLE:
                raise ValueError(
                    f"`settings` has {entry!r} with {key!r}, expected an argument of what comes after the base "
                    f"({', '.join(_CHANGEABLE)}): leave it out, or give it to all runs as --{key}."
                )
        return cls(label.strip(), {key: yaml_value(entry, key, text, "settings") for key, text in texts.items()})


@dataclass
class StepsArguments:
    """What to run, and how often."""

    settings: list[str] = field(
        default_factory=lambda: ["recipe:"],
        metadata={
            "help": "Settings to compare, 'label: argument=value,argument=value'; the first one sets the loss to reach."
        },
    )
    steps: list[int] = field(
        default_factory=lambda: [25, 50, 75, 100, 150, 300],
        metadata={"help": "Numbers of adapter_train_steps, the recipe's among them."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds, one base for each."})
    num_workers: int = field(default=1, metadata={"help": "Runs at a time."})

    def __post_init__(self) -> None:
        check_field_types(self)
        check_at_least_one("num_workers", self.num_workers)
        check_seeds(self.seeds)
        if not self.steps or self.steps[0] < 1 or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"`steps` is {self.steps}, expected increasing numbers above 0: sort them, each once.")
        self.parsed()

    def parsed(self) -> list[Setting]:
        """The settings; raises a ValueError if there is none, one is not possible, or two are the same."""
        if not self.settings:
            raise ValueError("`settings` is [], expected at least one, such as 'recipe:'.")
        parsed = [Setting.parse(entry) for entry in self.settings]
        for what in ("label", "key"):
            values = [getattr(one, what) for one in parsed]
            check_different(what, values, self.settings, "are not told apart: change or leave out one", "settings")
        return parsed


def run_steps(asked: StepsArguments, recipe: RunArguments) -> dict[tuple[str, int, int], dict[str, Any] | None]:
    """
    Train with each setting, number of steps and seed; what is finished is not run again, and no failure loses the others.

    Args:
        asked ([`StepsArguments`]): settings, steps, seeds, workers.
        recipe ([`RunArguments`]): what all runs share; its `output_dir` is the folder of all.

    Returns:
        `dict`: (label of the setting, steps, seed) -> results of the run; None for one that failed, whose log says why.

    Raises:
        ValueError: a recipe that has no adapters after a shared base, or not its number of steps among `steps`; a value that no run
            takes.
        FolderInUseError: another table is made in `output_dir`.
    """
    _check_recipe(recipe, asked.steps)
    folder = Path(recipe.training.output_dir)
    places = list(product(asked.seeds, asked.parsed(), asked.steps))
    jobs = [_job(recipe, setting, steps, seed, folder) for seed, setting, steps in places]
    with folder_lock(folder):
        outcomes = run_on_shared_bases(jobs, folder / "bases", asked.num_workers, description="runs", shown=loss_text)
    return {
        (setting.label, steps, seed): outcome.results
        for (seed, setting, steps), outcome in zip(places, outcomes, strict=True)
    }


def _check_recipe(recipe: RunArguments, steps: Sequence[int]) -> None:
    training = recipe.training
    strategy = strategy_class(training.strategy, training.strategy_options)
    if strategy.prefix != "adapter" or not strategy.has_held_out_loss:
        raise ValueError(
            f"`strategy` is {training.strategy!r}, expected one that trains `adapter_train_steps` steps after the base and has a "
            "held-out loss: take 'funlora'."
        )
    if has_own_order(recipe):
        raise ValueError(
            "`class_order` or `class_order_seed` is given, expected neither: settings are compared after a shared base, which needs "
            "the dataset's order."
        )
    if training.adapter_train_steps not in steps:
        raise ValueError(
            f"`steps` is {list(steps)}, and the recipe's `adapter_train_steps` is {training.adapter_train_steps}, expected it among them: "
            "there the first setting sets the loss to reach."
        )


def _job(recipe: RunArguments, setting: Setting, steps: int, seed: int, folder: Path) -> Job:
    path = folder / f"seed_{seed}" / setting.key / str(steps)
    changes = {**CHEAP_EVALUATION, "num_samples_per_class": SAMPLES, "seed": seed, "output_dir": os.fspath(path)}
    own = {**setting.changes, "adapter_train_steps": steps}
    arguments = with_changes(recipe, changes)
    try:
        # Now, before anything runs.
        with_changes(arguments, own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`settings` has {setting.label!r}, whose run is not possible: {error}") from error
    return Job(arguments, path, f"{setting.label}, {steps} steps, seed {seed}", after_base=own)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        recipe, asked = parse(sys.argv[1:], StepsArguments, description=__doc__)
        results = run_steps(asked, recipe)
    except ERRORS as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        sys.exit(f"error: {error}")
    output_dir = Path(recipe.training.output_dir)
    print(write_report(results, recipe.training.adapter_train_steps, output_dir))
    failed = [
        f"{label!r} with {steps} steps (seed {seed})" for (label, steps, seed), run in results.items() if run is None
    ]
    if failed:
        sys.exit(f"error: runs of {', '.join(failed)} failed: see their log.txt in {output_dir}")


if __name__ == "__main__":
    main()
