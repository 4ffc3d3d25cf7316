"""Writes the table "steps to a loss" as JSON, Markdown and figures. Reads results and samples; runs nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from safetensors.torch import load_file
from seed_tables import markdown_table, mean_and_std, provenance, spread_text
from torch import Tensor

from ablation.tables import losses_after_base
from comparison.figures import Look
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.evaluation.figures import GREY, enlarged, labelled, new_figure, on_white, save_picture, shorten
from funlora_hf.evaluation.report import figures_if_possible
from funlora_hf.utils.files import whole_file, write_json


# (label of the setting, steps, seed) -> results of the run, None for one that failed.
Results = Mapping[tuple[str, int, int], Mapping[str, Any] | None]
# Losses of one setting: steps -> one of each seed, None where a run failed.
Losses = Mapping[int, Sequence[float | None]]

# Of each class, in the figure, and classes; more would be no larger than a stamp.
SAMPLES = 4
_MOST_CLASSES = 10
_SIDE = 32


def write_report(results: Results, recipe_steps: int, output_dir: Path) -> str:
    """Write `steps_to_loss.json`, `steps_to_loss.md`, `figures/steps_to_loss.png` and `figures/samples_by_steps.png`; return the Markdown.

    Args:
        results: of all settings, steps and seeds; the first setting is the one to reach, the last one has its samples drawn.
        recipe_steps: where the loss of the first setting is the one to reach.
        output_dir: folder of the files.
    """
    rows = [_row(place, run) for place, run in results.items()]
    labels, steps, seeds = (list(dict.fromkeys(values)) for values in zip(*results, strict=True))
    loss_of = {(row["setting"], row["steps"], row["seed"]): row["loss"] for row in rows}
    losses = {one: {number: [loss_of[one, number, seed] for seed in seeds] for number in steps} for one in labels}
    reached = steps_to_reach(losses, recipe_steps, seeds)
    write_json(
        output_dir / "steps_to_loss.json", {**provenance(results.values()), "rows": rows, "steps_to_reach": reached}
    )
    text = as_markdown(losses, reached, recipe_steps)
    with whole_file(output_dir / "steps_to_loss.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with figures_if_possible():
        loss_figure(losses, output_dir / "figures" / "steps_to_loss.png", target=reached["mean"]["loss"])
    runs = {number: run for number in steps if (run := results[labels[-1], number, seeds[0]]) is not None}
    if runs:
        title = f"{labels[-1]}, seed {seeds[0]}, always from the same noise"
        samples_figure(runs, output_dir / "figures" / "samples_by_steps.png", title=title)
    return text


def steps_to_reach(losses: Mapping[str, Losses], recipe_steps: int, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The smallest number of steps with which each setting reaches the loss of the first one at the recipe's number of steps.

    Returns:
        For "mean", of the seeds, and for each "seed <number>": the "loss" to reach and "steps", a number by setting. None: a run failed,
        or no number of steps reaches it.
    """
    ways = {"mean": lambda of_seeds: mean_and_std(of_seeds)[0]}
    ways |= {f"seed {seed}": lambda of_seeds, place=place: of_seeds[place] for place, seed in enumerate(seeds)}
    found = {}
    for name, value in ways.items():
        curves = {
            label: {number: value(of_seeds) for number, of_seeds in of_steps.items()}
            for label, of_steps in losses.items()
        }
        target = next(iter(curves.values()))[recipe_steps]
        found[name] = {"loss": target, "steps": {label: _first(curve, target) for label, curve in curves.items()}}
    return found


def as_markdown(losses: Mapping[str, Losses], reached: Mapping[str, Mapping[str, Any]], recipe_steps: int) -> str:
    """The table of losses, "mean ± standard deviation over the seeds", and below it the one of `steps_to_reach`."""
    steps = next(iter(losses.values()))
    rows = [[n, *(spread_text(*mean_and_std(of_steps[n]), 4) for of_steps in losses.values())] for n in steps]
    titles = [f"{name} ({spread_text(one['loss'], None, 4)})" for name, one in reached.items()]
    numbers = [[label, *(one["steps"][label] or "-" for one in reached.values())] for label in losses]
    return (
        f"Held-out loss of the classes after the base, by steps of each class:\n\n{markdown_table(['steps', *losses], rows, texts=0)}\n\n"
        f"Steps to the loss of {next(iter(losses))!r} at {recipe_steps} steps (-: none of these):\n\n"
        f"{markdown_table(['setting', *titles], numbers)}\n"
    )


def loss_figure(losses: Mapping[str, Losses], path: str | os.PathLike[str], *, target: float | None) -> None:
    """Draw the mean loss by steps, a line a setting, with the standard deviation over seeds as a band, and the loss to reach.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with new_figure(path, (5.5, 3.6)) as figure:
        axes = figure.add_subplot(xscale="log", xlabel="steps of each class, log scale", ylabel="held-out loss")
        axes.grid(axis="y")
        for place, (label, of_steps) in enumerate(losses.items()):
            # NaN, of a run that failed, has no point.
            values, look, steps = np.array([*of_steps.values()], dtype=float), Look.of(place), list(of_steps)
            middle = values.mean(axis=1)
            if values.shape[1] > 1:
                spread = values.std(axis=1, ddof=1)
                band = {"color": look.colour, "alpha": 0.13, "linewidth": 0}
                axes.fill_between(steps, middle - spread, middle + spread, **band)
            axes.plot(steps, middle, label=shorten(label), **look.style())
        if target is not None:
            axes.axhline(target, color=GREY, linestyle=":", linewidth=1)
        axes.set_xticks(steps, labels=steps)
        axes.set_xticks([], minor=True)
        axes.legend()


def samples_figure(runs: Mapping[int, Mapping[str, Any]], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw samples of the classes after the base, at most ten: a row for each number of steps, whose run's results `runs` has."""
    images = {number: _samples(run) for number, run in runs.items()}
    rows = [[on_white([enlarged(one, _SIDE)], gap=2) for one in by_class.values()] for by_class in images.values()]
    names = [f"{number} steps" for number in runs]
    columns = [shorten(name, 18) for name in next(iter(images.values()))]
    save_picture(labelled(rows, gap=_SIDE // 2, names=names, columns=columns, title=title), path)


def _row(place: tuple[str, int, int], run: Mapping[str, Any] | None) -> dict[str, Any]:
    row = dict(zip(("setting", "steps", "seed"), place, strict=True))
    if run is None:
        return {**row, "loss": None, "loss_per_class": {}, "seconds": None}
    losses = losses_after_base(run)
    seconds = sum(run["seconds"]["training_per_task"][1:])
    return {**row, "loss": mean(losses.values()), "loss_per_class": losses, "seconds": seconds}


def _first(curve: Mapping[int, float | None], target: float | None) -> int | None:
    known = {number: loss for number, loss in curve.items() if loss is not None}
    return None if target is None else next((number for number, loss in known.items() if loss <= target), None)


def _samples(run: Mapping[str, Any]) -> dict[str, Tensor]:
    """Class name -> its first samples, uint8 (N, C, H, W)."""
    folder = RunFolder(Path(run["settings"]["ContinualTrainingArguments"]["output_dir"]))
    tensors, last = load_file(folder.samples), len(run["tasks"])
    classes = [class_id for task in run["tasks"][1:] for class_id in task][:_MOST_CLASSES]
    return {run["class_names"][str(c)]: tensors[f"task_{last}/class_{c}"] for c in classes}
