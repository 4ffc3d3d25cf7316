"""Compares strategies that learn concept after concept on the same base, concepts and seeds, in tables and figures.

    python examples/compare_personalization.py --strategies funlora lora naive_lora --seeds 0 1 --output_dir outputs/concepts_compared
    python examples/compare_personalization.py --strategies funlora funlora:function=identity,label=identity clora:penalty=10 \\
        --rate_factors 0.5 1 2

A strategy is a name, or name:key=value,key=value; a key is an option of the strategy, an argument of `funlora personalize`, or
`label`. A seed is also an order of the concepts: seed 0 has that of the file, any other a random one, unless `--concept_order` gives
one for all. With `--rate_factors`, each strategy gets its own learning rate: the default times one of these, whichever has the best
score at the end of the first two concepts with the first seed; where that is the lowest or the highest, rates beyond it are tried.
Other arguments are those of `funlora personalize`, and hold for every run.

Each run has a folder of its own, `seed_<seed>/<label>` in `--output_dir`, beside `comparison.json`, `comparison.md` and `figures/`.
Started again with the same arguments, it runs what is not finished. Exit codes: 0, all runs finished; 1, an error, or a run
failed, whose log.txt says why; 2, an unknown argument.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.concept_choices import Choice, check
from comparison.concept_report import write_report
from comparison.concept_runs import Job, choose_rates, orders, run_all
from funlora_hf.personalization.arguments import TINY, ConceptArguments
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.strategies.registry import CONCEPT_STRATEGIES
from funlora_hf.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategies", nargs="+", default=list(CONCEPT_STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rate_factors", nargs="+", type=float, help="None: the default rate of each strategy.")
    parser.add_argument(
        "--concept_order", nargs="+", help="Of all seeds; None: the file's for seed 0, random for others."
    )
    parser.add_argument("--num_workers", type=int, default=1, help="Runs at a time; they share the cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/concepts_compared"))
    given, shared = parser.parse_known_args()
    try:
        choices = [Choice.parse(text) for text in given.strategies]
        arguments = check(choices, shared)
        compare(given, choices, shared, arguments.concepts)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def compare(
    given: argparse.Namespace, choices: Sequence[Choice], shared: Sequence[str], arguments: ConceptArguments
) -> None:
    """Choose rates, run everything and write the comparison; ends the process with 1 if a run failed."""
    names = [one.name for one in load_concepts(arguments.concepts)]
    folder, order = given.output_dir, orders(names, given.seeds, given.concept_order)
    rates: dict[str, Any] = {}
    if given.rate_factors:
        seed = given.seeds[0]
        tiny = arguments.pretrained_model_name_or_path == TINY
        choices, rates = choose_rates(
            choices, given.rate_factors, order[seed], seed, shared, folder, given.num_workers, tiny=tiny
        )
    jobs = {
        (choice.label, seed): Job.of(folder / f"seed_{seed}" / choice.label, choice, shared, seed, order[seed])
        for seed in given.seeds
        for choice in choices
    }
    outcomes = run_all(jobs, given.num_workers)
    results = {
        choice.label: runs
        for choice in choices
        if (runs := [found for seed in given.seeds if (found := outcomes[choice.label, seed]) is not None])
    }
    failed = [str(jobs[key].folder) for key, found in outcomes.items() if found is None]
    command = shlex.join(["python", *sys.argv])
    write_json(
        folder / "comparison.json",
        {"command": command, "rates": rates, "orders": order, "results": results, "failed": failed},
    )
    if complete := {
        label: runs for label, runs in results.items() if len(runs) == len(given.seeds) and runs[0]["scores"]
    }:
        seed = given.seeds[0]
        folders = {label: jobs[label, seed].folder for label in complete}
        print(write_report(complete, folder, command, folders, order[seed]))
    if failed:
        sys.exit(f"error: failed runs: {', '.join(failed)}")


if __name__ == "__main__":
    main()
