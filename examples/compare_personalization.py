"""Compares strategies that learn concept after concept on the same base, concepts and seeds: a table and two figures.

    python examples/compare_personalization.py --strategies funlora lora naive_lora --seeds 0 1 --output_dir outputs/concepts_compared
    python examples/compare_personalization.py --strategies funlora funlora:function=identity,label=identity clora:penalty=10 \\
        --rate_factors 0.5 1 2

A strategy is a name, or name:key=value,key=value; a key is an option of the strategy, an argument of `funlora personalize`, or
`label`. A seed is also an order of the concepts: seed 0 has that of the file, any other a random one. With `--rate_factors`, each
strategy gets its own learning rate: the default times one of these, whichever has the best score at the end of the first two
concepts with the first seed; where that is the lowest or the highest, rates beyond it are tried. Other arguments are those of `funlora personalize`, and hold for every run.

Each run has a folder of its own, `seed_<seed>/<label>` in `--output_dir`, beside `comparison.json`, `comparison.md` and `figures/`.
Started again with the same arguments, it runs what is not finished. Exit codes: 0, all runs finished; 1, an error, or a run
failed, whose log.txt says why; 2, an unknown argument.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

from comparison.figures import COLOURS, MARKERS
from comparison.jobs import threads_per_worker
from comparison.learning_rates import Scores
from funlora_hf.evaluation.figures import new_figure, sample_grid
from funlora_hf.personalization.arguments import CONCEPT_ARGUMENTS, TINY, ConceptArguments
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.run import ConceptRunArguments
from funlora_hf.personalization.strategies.registry import CONCEPT_STRATEGIES, concept_strategy
from funlora_hf.utils.arguments import refuse_unknown
from funlora_hf.utils.files import read_json, write_json


# So often a rate beyond the edge is tried.
_EXTENSIONS = 3


@dataclass(frozen=True)
class Choice:
    """A strategy to compare: its name, what tables call it, and what its runs have of their own."""

    name: str
    label: str
    arguments: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read `name:key=value,...`; raises a ValueError for an unknown name or a part that is no key=value."""
        name, _, rest = text.partition(":")
        concept_strategy(name)
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise ValueError(f"`strategies` has {text!r}, expected name:key=value,...; {wrong[0]!r} has no value.")
        given = {key: value for key, _, value in pairs}
        return cls(name, given.pop("label", text), given)

    def options(self) -> list[str]:
        """Return these arguments as those of the command."""
        own = concept_strategy(self.name).known_options()
        of_strategy = [f"{key}={value}" for key, value in self.arguments.items() if key in own]
        others = [
            word for key, value in self.arguments.items() if key not in own for word in (f"--{key}", *value.split("+"))
        ]
        return ["--strategy", self.name, *(["--strategy_options", *of_strategy] if of_strategy else []), *others]


@dataclass(frozen=True)
class Job:
    """A run: where, and the arguments of its command."""

    folder: Path
    options: tuple[str, ...]

    def run(self, threads: int | None) -> dict[str, Any] | None:
        """Return the results of the run, which is done if it is not finished, with so many threads; None: it failed."""
        results = self.folder / "results.json"
        if not results.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "funlora_hf.personalization.command", *self.options]
            command += ["--output_dir", str(self.folder), "--resume_from_checkpoint", "latest"]
            environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
            with open(self.folder / "log.txt", "ab") as log:
                done = subprocess.run(command, stdout=log, stderr=log, check=False, env=environment)  # noqa: S603
            code = done.returncode
            print(f"{self.folder}: {'finished' if code == 0 else f'FAILED, see {self.folder}/log.txt'}", flush=True)
        return read_json(results) if results.is_file() else None


def orders(concepts: Sequence[str], seeds: Sequence[int]) -> dict[int, list[str]]:
    """Return the order of the concepts for each seed."""
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
    # The best is the lowest there: scores with their sign changed, by factor.
    scores = {choice.label: Scores() for choice in choices if rate_argument(choice) not in choice.arguments}
    to_try = {label: list(factors) for label in scores}
    for _ in range(1 + _EXTENSIONS):
        jobs: dict[tuple[str, float], Job] = {}
        for choice in choices:
            for factor in to_try.get(choice.label, ()):
                rate = f"{default_rate(choice, tiny=tiny) * factor:g}"
                tried = replace(choice, arguments={**choice.arguments, rate_argument(choice): rate})
                options = (*tried.options(), *shared, "--seed", str(seed), "--concept_order", *order[:2])
                jobs[choice.label, factor] = Job(folder / "rates" / choice.label / rate, options)
        for (label, factor), results in run_all(jobs, workers).items():
            if results is not None and results["scores"]:
                scores[label].losses[factor] = -results["scores"][score_of(results)]["end"]
        to_try = {label: found.beyond() for label, found in scores.items()}
    chosen, record = [], {}
    for choice in choices:
        if (found := scores.get(choice.label)) and found.losses:
            default = default_rate(choice, tiny=tiny)
            record[choice.label] = {
                "chosen": f"{default * found.best:g}",
                "scores": {f"{default * factor:g}": -loss for factor, loss in sorted(found.losses.items())},
                "at_the_edge": found.is_at_edge,
            }
            choice = replace(
                choice, arguments={**choice.arguments, rate_argument(choice): record[choice.label]["chosen"]}
            )
        chosen.append(choice)
    return chosen, record


def rate_argument(choice: Choice) -> str:
    """Return which rate of a strategy is chosen: that of its layers, or of the token if it trains nothing else."""
    return "concept_learning_rate" if concept_strategy(choice.name).rates else "token_learning_rate"


def default_rate(choice: Choice, *, tiny: bool) -> float:
    """Return that rate's default."""
    strategy = concept_strategy(choice.name)
    rates = strategy.rates or strategy.token_rates
    return rates.tiny if tiny else rates.other


def run_all(jobs: dict[Any, Job], workers: int) -> dict[Any, dict[str, Any] | None]:
    """Run jobs, several at a time, which share the cores."""
    run = partial(Job.run, threads=threads_per_worker(workers))
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(run, jobs.values()), strict=True))


Runs = Sequence[dict[str, Any]]


def table(results: dict[str, Runs]) -> str:
    """Return the comparison as two tables in Markdown, of scores and of the rest: means over seeds."""
    first = next(iter(results.values()))[0]
    names = list(first["scores"])
    score, base_score = names[0], next(iter(first["base_drift"]["before"]))
    scores = {
        f"{score} at its own time": lambda runs: spread(run["scores"][score]["own"] for run in runs),
        f"{score} at the end": lambda runs: spread(run["scores"][score]["end"] for run in runs),
        "forgetting": lambda runs: f"{fmean(run['scores'][score]['forgetting'] for run in runs):.2f}",
        **{
            f"{name}, end": lambda runs, name=name: f"{fmean(run['scores'][name]['end'] for run in runs):.2f}"
            for name in names[1:]
        },
        "two concepts": lambda runs: mean_or_none([of_pairs(run, score) for run in runs]),
    }
    rest = {
        f"base prompts, end: {base_score}": lambda runs: mean_or_none([last_drift(run, base_score) for run in runs]),
        "change": lambda runs: mean_or_none([last_drift(run, "change") for run in runs], digits=3),
        f"with a concept: {base_score}": lambda runs: mean_or_none([with_concept(run, base_score) for run in runs]),
        "its change": lambda runs: mean_or_none([with_concept(run, "change") for run in runs], digits=3),
        "first samples identical": lambda runs: {True: "yes", False: "NO", None: "-"}[
            runs[0]["zero_forgetting"]["identical"]
        ],
        "numbers a concept": lambda runs: f"{fmean(run['numbers_per_concept'] for run in runs):,.0f}",
        "bytes kept": lambda runs: f"{fmean(run['bytes_kept'] for run in runs):,.0f}",
        "seconds of training": lambda runs: f"{fmean(run['seconds']['training'] for run in runs):.0f}",
    }
    said = [
        f"{name} {first['floor'][name]:.2f} / {first['ceiling'][name]:.2f}" for name in names if name in first["floor"]
    ]
    floor = f"Floor (the base with the noun) / ceiling (real images): {'; '.join(said)}."
    before = f"Base prompts before learning: {base_score} {first['base_drift']['before'][base_score]:.2f}."
    norms = [
        f"Norms of the products of {label}, first seed: {', '.join(f'{one:.3g}' for one in found)}."
        for label, (run, *_) in results.items()
        if (found := run["details"].get("product_norms"))
    ]
    return "\n\n".join([rows(results, scores), floor, rows(results, rest), before, *norms])


def rows(results: dict[str, Runs], columns: Mapping[str, Callable[[Runs], str]]) -> str:
    """Return a table with a row for each strategy."""
    lines = [f"| strategy | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    lines += [
        f"| {label} | {' | '.join(cell(runs) for cell in columns.values())} |" for label, runs in results.items()
    ]
    return "\n".join(lines)


def spread(values: Iterable[float]) -> str:
    """Return the mean, and the values of the seeds if there are several."""
    found = list(values)
    each = f" ({', '.join(f'{one:.2f}' for one in found)})" if len(found) > 1 else ""
    return f"{fmean(found):.2f}{each}"


def mean_or_none(values: Sequence[float | None], digits: int = 2) -> str:
    """Return the mean of what was measured; empty: nothing was."""
    found = [one for one in values if one is not None]
    return f"{fmean(found):.{digits}f}" if found else ""


def of_pairs(run: dict[str, Any], score: str) -> float | None:
    """Return the mean score of a concept in images of prompts with two."""
    found = [one[score] for pair in run["pairs"] for one in pair["scores"].values()]
    return fmean(found) if found else None


def with_concept(run: dict[str, Any], name: str) -> float | None:
    """Return how base prompts are drawn with the weights of a concept, as the mean over concepts."""
    found = [one[name] for one in run["base_drift"]["with_concept"].values() if name in one]
    return fmean(found) if found else None


def last_drift(run: dict[str, Any], name: str) -> float | None:
    """Return how the model without a concept of its own draws base prompts at the end."""
    found = [one for one in run["base_drift"]["after_task"] if one is not None]
    return found[-1].get(name) if found else None


def curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw each strategy's mean score of the concepts so far, over the number of concepts."""
    name = score_of(next(iter(results.values()))[0])
    with new_figure(path, (7.5, 4.2)) as figure:
        axes = figure.subplots()
        for index, (label, runs) in enumerate(results.items()):
            rows = zip(*(run["scores"][name]["matrix"] for run in runs), strict=True)
            means = [fmean(fmean(row) for row in of_seeds) for of_seeds in rows]
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            dashes = "-" if index < len(COLOURS) else "--"
            axes.plot(range(1, len(means) + 1), means, label=label, linestyle=dashes, markersize=5, **look)
        axes.set(xlabel="concepts learned", ylabel=f"{name}, mean of the concepts so far", ylim=(0, 1.02))
        axes.set_xticks(range(1, len(means) + 1))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def samples(folders: dict[str, Path], orders_of: Sequence[str], path: Path) -> None:
    """Draw one image of the first concept after each task: a row for each strategy."""
    rows = {}
    for label, folder in folders.items():
        files = [
            folder / "checkpoints" / "evaluation" / f"task_{task}" / f"{orders_of[0]}.safetensors"
            for task in range(1, len(orders_of) + 1)
        ]
        # What never changes is drawn once.
        found = [file if file.is_file() else files[0] for file in files]
        if found[0].is_file():
            rows[label] = torch.stack([load_file(file)["images"][0] for file in found])
    if rows:
        sample_grid(rows, path, title=f"{orders_of[0]} after 1 to {len(orders_of)} concepts")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategies", nargs="+", default=list(CONCEPT_STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rate_factors", nargs="+", type=float, help="None: the default rate of each strategy.")
    parser.add_argument("--num_workers", type=int, default=1, help="Runs at a time; they share the cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/concepts_compared"))
    given, shared = parser.parse_known_args()
    try:
        choices = [Choice.parse(text) for text in given.strategies]
        arguments = check(choices, shared)
        compare(given, choices, shared, arguments.concepts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check(choices: Sequence[Choice], shared: Sequence[str]) -> ConceptRunArguments:
    """Return the arguments that all runs share, after a check of each strategy's, before anything runs."""
    parser = HfArgumentParser(CONCEPT_ARGUMENTS, allow_abbrev=False)
    labels = [choice.label for choice in choices]
    if len(set(labels)) < len(labels):
        raise ValueError(f"`strategies` has {labels}, expected each label once: add label=...")
    for owned in (
        "--seed",
        "--strategy",
        "--strategy_options",
        "--concept_order",
        "--output_dir",
        "--resume_from_checkpoint",
    ):
        if owned in shared:
            raise ValueError(f"{owned} is given for all runs, expected none: the comparison sets it.")
    if "--push_to_hub" in shared:
        raise ValueError(
            "--push_to_hub is given, but the runs of a comparison cannot share a repository: compare, then `funlora push` one."
        )
    for options in ([], *(choice.options() for choice in choices)):
        *parts, unknown = parser.parse_args_into_dataclasses(
            [*shared, *options], return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        arguments = ConceptRunArguments(*parts)
    return arguments


def compare(
    given: argparse.Namespace, choices: Sequence[Choice], shared: Sequence[str], arguments: ConceptArguments
) -> None:
    """Choose rates, run everything and write the comparison; ends the process with 1 if a run failed."""
    names = [one.name for one in load_concepts(arguments.concepts)]
    folder, order = given.output_dir, orders(names, given.seeds)
    rates: dict[str, Any] = {}
    if given.rate_factors:
        seed = given.seeds[0]
        tiny = arguments.pretrained_model_name_or_path == TINY
        choices, rates = choose_rates(
            choices, given.rate_factors, order[seed], seed, shared, folder, given.num_workers, tiny=tiny
        )
    jobs = {
        (choice.label, seed): Job(
            folder / f"seed_{seed}" / choice.label,
            (*choice.options(), *shared, "--seed", str(seed), "--concept_order", *order[seed]),
        )
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
        text = table(complete)
        (folder / "comparison.md").write_text(f"{text}\n\nCommand: `{command}`\n", encoding="utf-8")
        print(text)
        curves(complete, folder / "figures" / "scores.png")
        seed = given.seeds[0]
        samples(
            {label: jobs[label, seed].folder for label in complete}, order[seed], folder / "figures" / "samples.png"
        )
    if failed:
        sys.exit(f"error: failed runs: {', '.join(failed)}")


if __name__ == "__main__":
    main()
