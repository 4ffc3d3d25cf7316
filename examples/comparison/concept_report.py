"""Writes a comparison of strategies of concepts as tables in Markdown and as figures. Reads results; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from seed_tables import markdown_table

from comparison.concept_figures import Panel, axes_figure, samples_figure, scores_figure
from comparison.concept_runs import score_of
from funlora_hf.personalization.strategies.registry import concept_strategy


Run = Mapping[str, Any]
Results = Mapping[str, Sequence[Run]]
"""Strategy -> the results of its seeds."""

_KINDS = {False: "an adapter for each concept", True: "one model for all"}


@dataclass(frozen=True)
class Column:
    """A number of each run, as a column of a table.

    Args:
        title: of the column.
        value: of a run's results; None where it was not measured.
        digits: after the point.
        each: whether the numbers of the seeds stand beside their mean.
    """

    title: str
    value: Callable[[Run], float | None]
    digits: int = 2
    each: bool = False

    def of(self, runs: Sequence[Run]) -> list[float]:
        """Return the numbers of the runs in which it was measured."""
        return [value for run in runs if (value := self.value(run)) is not None]

    def cell(self, runs: Sequence[Run]) -> str:
        """Return the mean over the seeds; empty: none was measured."""
        found = self.of(runs)
        each = f" ({', '.join(f'{one:.{self.digits}f}' for one in found)})" if self.each and len(found) > 1 else ""
        return f"{fmean(found):,.{self.digits}f}{each}" if found else ""


def write_report(
    results: Results, folder: Path, command: str, folders: Mapping[str, Path], order: Sequence[str]
) -> str:
    """Write `comparison.md` and `figures/`.

    Args:
        results: with the same scores for all strategies.
        folder: of the comparison.
        command: that made it.
        folders: those of each strategy's first run.
        order: of the concepts in it.

    Returns:
        The tables.

    Raises:
        ImportError: matplotlib is not installed.
    """
    text, groups, score = tables(results), groups_of(results), _scores_of(results)[0]
    (folder / "comparison.md").write_text(f"{text}\n\nCommand: `{command}`\n", encoding="utf-8")
    labels = chain.from_iterable(groups.values())
    samples = {label: images for label in labels if (images := _first_images(folders[label], order)) is not None}
    if samples:
        title = f"{order[0]} after 1 to {len(order)} concepts"
        samples_figure(samples, folder / "figures" / "samples.png", title=title)
    axes_figure(groups, panels(results), folder / "figures" / "axes.png")
    means = {label: _mean_so_far(runs, score) for label, runs in results.items()}
    title = f"{score}, mean of the concepts so far"
    scores_figure(groups, means, folder / "figures" / "scores.png", title=title)
    return text


def tables(results: Results) -> str:
    """Return the comparison as three tables in Markdown, of axes and costs, of scores and of base prompts: means over seeds."""
    first, (score, base), axes = _first(results), _scores_of(results), axes_of(results)
    costs = [
        Column("numbers a concept", lambda run: run["numbers_per_concept"], 0),
        Column("bytes kept", lambda run: run["bytes_kept"], 0),
        Column("seconds of training", lambda run: run["seconds"]["training"], 0),
    ]
    scores = [
        Column(f"{score}, own time", lambda run: run["scores"][score]["own"], each=True),
        *(
            Column(f"{name}, end", lambda run, name=name: run["scores"][name]["end"], each=name == score)
            for name in first["scores"]
        ),
        # Each one's share of images is known, not that of the images in which both are: it is at most the lower one.
        Column("two whole in a prompt, at most", lambda run: _of_pairs(run, "whole", min)),
    ]
    drift = [
        Column("base prompts, end: change", lambda run: _last_drift(run, "change"), 3),
        Column("with a concept: change", lambda run: _with_concept(run, "change"), 3),
    ]
    before = first["base_drift"]["before"].get(base)
    floor = [f"{name} {value:.2f} / {first['ceiling'][name]:.2f}" for name, value in first["floor"].items()]
    parts = [
        _table(results, {column.title: column.cell for column in [*axes, *costs]}),
        "" if before is None else f"Base prompts before learning: {base} {before:.2f}.",
        _table(results, {column.title: column.cell for column in scores}),
        f"Floor (the base with the noun) / ceiling (real images): {'; '.join(floor)}.",
        _table(results, {**{column.title: column.cell for column in drift}, "first samples identical": _identical}),
        *(
            f"Norms of the products of {label}, first seed: {', '.join(f'{one:.3g}' for one in found)}."
            for label, (run, *_) in results.items()
            if (found := run["details"].get("product_norms"))
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def axes_of(results: Results) -> tuple[Column, Column, Column, Column, Column, Column]:
    """Return the axes: generality, the same with a concept's weights, learned, kept, forgetting, across tasks."""
    score, base = _scores_of(results)
    return (
        Column(f"generality: {base} of base prompts", lambda run: _last_drift(run, base)),
        Column("the same with a concept's weights", lambda run: _with_concept(run, base)),
        Column(f"learned: {score} at its own time", lambda run: run["scores"][score]["own"]),
        Column(f"kept: {score} at the end", lambda run: run["scores"][score]["end"]),
        Column("forgetting", lambda run: run["scores"][score]["forgetting"]),
        Column(f"across tasks: {score} of each of two", lambda run: _of_pairs(run, score, fmean)),
    )


def panels(results: Results) -> list[Panel]:
    """Return the four axes as panels of a figure, on which better is to the right."""
    first, (score, base) = _first(results), _scores_of(results)
    generality, with_concept, learned, kept, _, across = (
        {label: column.of(runs) for label, runs in results.items()} for column in axes_of(results)
    )
    before = first["base_drift"]["before"]
    marks = {name: first[name][score] for name in ("floor", "ceiling") if score in first[name]}
    return [
        Panel(
            "generality kept",
            f"{base} of base prompts\n● no concept asked for\n○ a concept's weights on",
            generality,
            rings=with_concept,
            marks={"base": before[base]} if base in before else {},
        ),
        Panel("target learned", f"{score} at its own time", learned, marks=marks),
        Panel("kept", f"{score} at the end", kept, marks=marks),
        Panel("across tasks", f"{score} of each of two\nin a prompt", across),
    ]


def groups_of(results: Results) -> dict[str, list[str]]:
    """Return the strategies with an adapter for each concept, and those with one model, each with the best first."""
    _, _, learned, kept, *_ = axes_of(results)

    def merit(label: str) -> float:
        return fmean(learned.of(results[label])) + fmean(kept.of(results[label]))

    groups: dict[str, list[str]] = {heading: [] for heading in _KINDS.values()}
    for label in sorted(results, key=merit, reverse=True):
        groups[_KINDS[concept_strategy(results[label][0]["strategy"]).in_model]].append(label)
    return {heading: labels for heading, labels in groups.items() if labels}


def _first(results: Results) -> Run:
    return next(iter(results.values()))[0]


def _scores_of(results: Results) -> tuple[str, str]:
    """Return by which score of concepts, and by which of base prompts, strategies are compared."""
    first = _first(results)
    # DINO has no score of prompts; how many images are equal to the base's is always known.
    return score_of(first), next(iter(first["base_drift"]["before"]), "same")


def _table(results: Results, columns: Mapping[str, Callable[[Sequence[Run]], str]]) -> str:
    """Return a table with a row for each strategy."""
    rows = [(label, *(cell(runs) for cell in columns.values())) for label, runs in results.items()]
    return markdown_table(["strategy", *columns], rows)


def _identical(runs: Sequence[Run]) -> str:
    found = [run["zero_forgetting"]["identical"] for run in runs]
    return "NO" if False in found else "yes" if True in found else "-"


def _of_pairs(run: Run, score: str, both: Callable[[list[float]], float]) -> float | None:
    """Return a score in images of prompts with two concepts: what `both` makes of the two, as the mean over pairs."""
    scores = [[one[score] for one in pair["scores"].values() if score in one] for pair in run["pairs"]]
    found = [both(of_two) for of_two in scores if of_two]
    return fmean(found) if found else None


def _with_concept(run: Run, name: str) -> float | None:
    """Return how base prompts are drawn with the weights of a concept, as the mean over concepts."""
    found = [one[name] for one in run["base_drift"]["with_concept"].values() if name in one]
    return fmean(found) if found else None


def _last_drift(run: Run, name: str) -> float | None:
    """Return how the model without a concept of its own draws base prompts at the end."""
    found = [one for one in run["base_drift"]["after_task"] if one is not None]
    return found[-1].get(name) if found else None


def _mean_so_far(runs: Sequence[Run], score: str) -> list[float]:
    """Return the mean score of the concepts so far after each task."""
    by_task = zip(*(run["scores"][score]["matrix"] for run in runs), strict=True)
    return [fmean(fmean(row) for row in of_seeds) for of_seeds in by_task]


def _first_images(folder: Path, order: Sequence[str]) -> torch.Tensor | None:
    """Return an image of the first concept after each task, uint8 (tasks, C, H, W); None: there is none."""
    tasks = range(1, len(order) + 1)
    files = [folder / "checkpoints" / "evaluation" / f"task_{task}" / f"{order[0]}.safetensors" for task in tasks]
    # What never changes is drawn once.
    found = [file if file.is_file() else files[0] for file in files]
    return torch.stack([load_file(file)["images"][0] for file in found]) if found[0].is_file() else None
