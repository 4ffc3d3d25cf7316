"""Writes a comparison of strategies of concepts as tables in Markdown and as figures. Reads results; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from comparison.concept_runs import score_of
from comparison.figures import COLOURS, MARKERS
from funlora_hf.evaluation.figures import new_figure, sample_grid


Runs = Sequence[dict[str, Any]]


def write_report(
    results: dict[str, Runs], folder: Path, command: str, runs: Mapping[str, Path], order: Sequence[str]
) -> str:
    """Write `comparison.md` and `figures/`.

    Args:
        results: of each strategy's seeds.
        folder: of the comparison.
        command: that made it.
        runs: each strategy's folder with the first seed.
        order: of the concepts in them.

    Returns:
        The tables.
    """
    text = table(results)
    (folder / "comparison.md").write_text(f"{text}\n\nCommand: `{command}`\n", encoding="utf-8")
    curves(results, folder / "figures" / "scores.png")
    samples(runs, order, folder / "figures" / "samples.png")
    return text


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
