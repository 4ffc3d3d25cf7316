"""Compares strategies that learn concept after concept on the same base, concepts and seeds: a table and two figures.

    python examples/compare_personalization.py --strategies funlora lora naive_lora --seeds 0 1 --output_dir outputs/concepts_compared
    python examples/compare_personalization.py --strategies funlora funlora:function=identity,label=identity clora:penalty=10 \\
        --rate_factors 0.5 1 2

A strategy is a name, or name:key=value,key=value; a key is an option of the strategy, an argument of `funlora personalize`, or
`label`. A seed is also an order of the concepts: seed 0 has that of the file, any other a random one. With `--rate_factors`, each
strategy gets its own learning rate: the default times one of these, whichever has the best score at the end of the first two
concepts with the first seed. Other arguments are those of `funlora personalize`, and hold for every run.

Each run has a folder of its own, `seed_<seed>/<label>` in `--output_dir`, beside `comparison.json`, `comparison.md` and `figures/`.
Started again with the same arguments, it runs what is not finished. Exit codes: 0, all runs finished; 1, an error, or a run
failed, whose log.txt says why; 2, an unknown argument.
"""

from __future__ import annotations

import argparse
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

from comparison.figures import COLOURS, MARKERS
from funlora_hf.evaluation.figures import new_figure, sample_grid
from funlora_hf.personalization.arguments import CONCEPT_ARGUMENTS, TINY, ConceptArguments
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.run import ConceptRunArguments
from funlora_hf.personalization.strategies.registry import CONCEPT_STRATEGIES, concept_strategy
from funlora_hf.utils.arguments import refuse_unknown
from funlora_hf.utils.files import read_json, write_json


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

    def run(self) -> dict[str, Any] | None:
        """Return the results of the run, which is done if it is not finished; None: it failed."""
        results = self.folder / "results.json"
        if not results.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "funlora_hf.personalization.command", *self.options]
            command += ["--output_dir", str(self.folder), "--resume_from_checkpoint", "latest"]
            with open(self.folder / "log.txt", "ab") as log:
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode  # noqa: S603
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
    jobs: dict[tuple[str, float], Job] = {}
    for choice in choices:
        rates = concept_strategy(choice.name).rates or concept_strategy(choice.name).token_rates
        argument = "concept_learning_rate" if concept_strategy(choice.name).rates else "token_learning_rate"
        if argument in choice.arguments:
            continue
        for factor in factors:
            rate = (rates.tiny if tiny else rates.other) * factor
            tried = replace(choice, arguments={**choice.arguments, argument: f"{rate:g}"})
            place = folder / "rates" / choice.label / f"{rate:g}"
            jobs[choice.label, rate] = Job(
                place, (*tried.options(), *shared, "--seed", str(seed), "--concept_order", *order[:2])
            )
    found = run_all(jobs, workers)
    chosen, record = [], {}
    for choice in choices:
        scores = {
            rate: results["scores"][score_of(results)]["end"]
            for (label, rate), results in found.items()
            if label == choice.label and results is not None and results["scores"]
        }
        if not scores:
            chosen.append(choice)
            continue
        best = max(scores, key=lambda rate: scores[rate])
        argument = "concept_learning_rate" if concept_strategy(choice.name).rates else "token_learning_rate"
        record[choice.label] = {"chosen": best, "scores": {f"{rate:g}": one for rate, one in sorted(scores.items())}}
        record[choice.label]["at_the_edge"] = len(scores) > 1 and best in (min(scores), max(scores))
        chosen.append(replace(choice, arguments={**choice.arguments, argument: f"{best:g}"}))
    return chosen, record


def run_all(jobs: dict[Any, Job], workers: int) -> dict[Any, dict[str, Any] | None]:
    """Run jobs, several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(Job.run, jobs.values()), strict=True))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the comparison as a table in Markdown: means over seeds."""
    names = list(next(iter(results.values()))[0]["scores"])
    first = names[0] if names else ""
    titles = [
        "strategy",
        "numbers a concept",
        "bytes kept",
        "seconds of training",
        *(f"{name}: own, end" for name in names),
    ]
    titles += [f"forgetting ({first})", "base prompts: change", "identical"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for label, runs in results.items():
        cells = [
            label,
            f"{fmean(run['numbers_per_concept'] for run in runs):,.0f}",
            f"{fmean(run['bytes_kept'] for run in runs):,.0f}",
        ]
        cells.append(f"{fmean(run['seconds']['training'] for run in runs):.0f}")
        for name in names:
            cells.append(
                ", ".join(f"{fmean(run['scores'][name][time] for run in runs):.2f}" for time in ("own", "end"))
            )
        cells.append(f"{fmean(run['scores'][first]['forgetting'] for run in runs):.2f}" if first else "")
        drift = [one for run in runs if (one := last_drift(run)) is not None]
        cells.append(f"{fmean(one['change'] for one in drift):.3f}" if drift else "")
        cells.append({True: "yes", False: "NO", None: "-"}[runs[0]["zero_forgetting"]["identical"]])
        lines.append(f"| {' | '.join(cells)} |")
    floor = next(iter(results.values()))[0]["floor"] or {}
    ceiling = next(iter(results.values()))[0]["ceiling"] or {}
    said = [f"{name} {floor[name]:.2f} / {ceiling[name]:.2f}" for name in names if name in floor and name in ceiling]
    return "\n".join([*lines, "", f"Floor (the base with the noun) / ceiling (real images): {'; '.join(said)}."])


def last_drift(run: dict[str, Any]) -> dict[str, Any] | None:
    """Return how the model without a concept of its own draws base prompts at the end."""
    found = [one for one in (run["base_drift"] or {}).get("after_task", []) if one is not None]
    return found[-1] if found else None


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
    parser.add_argument("--num_workers", type=int, default=1, help="Runs at a time.")
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
