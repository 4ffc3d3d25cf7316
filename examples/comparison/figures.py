"""Draws a comparison as PNG files from plain data by strategy; it knows no run folder and no results."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from funlora_hf.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    check_images,
    enlarged,
    labelled,
    mark_places,
    new_figure,
    on_white,
    save_picture,
    shorten,
)


COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, BLACK, SKY_BLUE)
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
MOST_STRATEGIES = 2 * len(COLOURS)
# Inches.
PLOT_WIDTH = 4.2
PLOT_HEIGHT = 3.0
LABEL_HEIGHT = 0.17
# Long enough for the options, which tell strategies of one name apart.
LONGEST_LABEL = 64
# Numbers in the cells of larger matrices could not be read.
MOST_TASKS_WITH_NUMBERS = 12
# Of a cell of the grid of samples.
CLASSES_SHOWN = 3
IMAGES_SHOWN = 4
IMAGE_SIDE = 32
# A linear axis squeezes what is so much smaller than the largest.
LOG_SCALE_FROM = 20


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn in every figure: the first seven solid and filled, the others dashed and hollow."""

    colour: str
    marker: str
    linestyle: str
    filled: bool

    @classmethod
    def of(cls, place: int) -> Look:
        """That of the strategy at a place, from 0."""
        round_, place = divmod(place, len(COLOURS))
        # Another marker, so that the two of one colour do not share their shape as well.
        marker = MARKERS[(place + 3 * round_) % len(MARKERS)]
        return cls(COLOURS[place], marker, "--" if round_ else "-", not round_)

    def style(self, *, markersize: float = 5) -> dict[str, Any]:
        """Arguments of `plot`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.linestyle,
            "markersize": markersize,
            "markerfacecolor": self.colour if self.filled else "white",
            "linewidth": 1.4,
        }


def accuracy_figure(
    averages: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    classes_seen: Sequence[int],
    ppc: Mapping[str, float] | None = None,
) -> None:
    """Draws the average accuracy after each task, a line a strategy, with the standard deviation over seeds as a band.

    Args:
        averages: strategy -> `A[t]` after each task, of each seed. Unit: %, range [0, 100].
        path: the PNG to write.
        classes_seen: after each task.
        ppc: strategy -> parameters per class, shown with its name; strategies may be missing.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no strategy or too many, or one without a value for each task.
    """
    _check_strategies("averages", averages)
    for name, of_seeds in averages.items():
        _check_lengths(f"averages[{name!r}]", of_seeds, len(classes_seen))
    with new_figure(path, (PLOT_WIDTH, PLOT_HEIGHT), layout=None) as figure:
        (axes,) = _plots(figure, len(averages), panels=1)
        axes.set(ylim=(0, 100), xlabel="classes seen", ylabel="average accuracy (%)")
        for place, of_seeds in enumerate(averages.values()):
            values, look = np.array(of_seeds, dtype=float), Look.of(place)
            middle = values.mean(axis=0)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                low, high = np.clip(middle - spread, 0, 100), np.clip(middle + spread, 0, 100)
                axes.fill_between(classes_seen, low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.plot(classes_seen, middle, clip_on=False, zorder=3, **look.style())
        _mark_places(axes, classes_seen)
        ends = {name: np.mean(of_seeds, axis=0)[-1] for name, of_seeds in averages.items()}
        _label_lines(axes, ends, notes={name: f", PPC {numbers:,.0f}" for name, numbers in (ppc or {}).items()})


def cost_figure(
    seconds: Mapping[str, Sequence[float]],
    kept: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
) -> None:
    """Draws what each task costs: seconds of training above, megabytes kept after it below; a line a strategy.

    A scale is logarithmic where its values differ much; zeros, tasks in which nothing is trained, then have no point.

    Args:
        seconds: strategy -> seconds of each task.
        kept: strategy -> bytes kept after each task. Strategies may be missing from either, not from both.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no strategy or too many, or one without a task.
    """
    names = list(dict.fromkeys([*seconds, *kept]))
    _check_strategies("seconds", dict.fromkeys(names))
    megabytes = {name: [value / 1e6 for value in values] for name, values in kept.items()}
    panels = [
        (values, label)
        for values, label in ((seconds, "training of the task (s)"), (megabytes, "kept after the task (MB)"))
        if values
    ]
    for values, label in panels:
        for name, per_task in values.items():
            _check_lengths(f"{label}: {name!r}", [per_task], max(1, len(per_task)))
    with new_figure(path, (PLOT_WIDTH, PLOT_HEIGHT), layout=None) as figure:
        every = _plots(figure, len(names), panels=len(panels))
        for axes, (values, label) in zip(every, panels, strict=True):
            tasks = range(1, 1 + max(len(per_task) for per_task in values.values()))
            positive = [value for per_task in values.values() for value in per_task if value > 0]
            logarithmic = bool(positive) and max(positive) > LOG_SCALE_FROM * min(positive)
            ends = {}
            for name, per_task in values.items():
                shown = [value if value > 0 or not logarithmic else math.nan for value in per_task]
                axes.plot(tasks[: len(shown)], shown, clip_on=False, zorder=3, **Look.of(names.index(name)).style())
                ends[name] = shown[-1]
            if logarithmic:
                # Numbers such as 0.5 and 20 rather than powers, at steps that are enough to read from.
                steps = (1, 2, 5) if max(positive) < 1e3 * min(positive) else (1,)
                axes.set_yscale("log")
                axes.yaxis.get_major_locator().set_params(subs=steps)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            else:
                axes.set_ylim(0, 1.08 * max([*positive, 1e-9]))
            _mark_places(axes, list(tasks))
            axes.set_ylabel(label + (", log scale" if logarithmic else ""))
            _label_lines(axes, ends, names=names)
        every[-1].set_xlabel("task")


def forgetting_figure(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str],
) -> None:
    """Draws the accuracy on each task by the model after each task, a panel a strategy, all on one scale.

    Args:
        matrices: strategy -> `R[t][j]`, accuracy on task j after task t, ragged: row t has t + 1 entries. Unit: %.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no strategy or too many, or a matrix of another shape.
    """
    _check_strategies("matrices", matrices)
    for name, matrix in matrices.items():
        if not matrix or any(len(row) != task + 1 for task, row in enumerate(matrix)):
            raise ValueError(f"matrices[{name!r}] has rows of {[len(row) for row in matrix]}, expected 1, 2, 3, ...")
    tasks = max(len(matrix) for matrix in matrices.values())
    side = min(max(0.22 * tasks, 1.5), 3.4)
    columns = min(len(matrices), max(1, int(8.2 / (side + 0.35))))
    rows = math.ceil(len(matrices) / columns)
    size = (columns * (side + 0.35) + 0.9, rows * (side + 0.45) + 0.45)
    with new_figure(path, size) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(matrices) :]:
            axes.set_axis_off()
        for axes, (name, matrix) in zip(panels.flat, matrices.items(), strict=False):
            cells = _matrix_panel(axes, matrix)
            axes.set_title(textwrap.fill(shorten(name, LONGEST_LABEL), int(side * 15)), fontsize=9)
        figure.supxlabel("tested on task")
        figure.supylabel("after task")
        # Beside the first rows only: as high as the figure, it would be read from nowhere.
        share = min(1.0, 3.2 / size[1])
        bar = figure.colorbar(
            cells, ax=panels, fraction=0.04, pad=0.02, shrink=share, anchor=(0, 1), aspect=20 * min(1, size[1] / 3.2)
        )
        bar.outline.set_visible(False)
        bar.set_label("accuracy (%)")


def samples_figure(
    samples: Mapping[str, Sequence[Mapping[str, Tensor]]],
    path: str | os.PathLike[str],
) -> None:
    """Draws samples of the same classes by the model after each task: a row a strategy, a column a task.

    Small images are enlarged by a whole factor, each pixel to a square. A cell has a row of up to four images for each of
    up to three classes.

    Args:
        samples: strategy -> for each task, class name -> uint8 (N, C, H, W), range 0..255; the same classes and shape
            everywhere. A strategy may have fewer tasks than others.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no strategy or too many, or images that are not as described.
    """
    _check_strategies("samples", samples)
    for name, per_task in samples.items():
        for images_by_class in per_task:
            for images in images_by_class.values():
                check_images(f"samples[{name!r}]", images)

    def cell(by_class: Mapping[str, Tensor]) -> np.ndarray:
        shown = list(by_class.values())[:CLASSES_SHOWN]
        return on_white([enlarged(images[:IMAGES_SHOWN], IMAGE_SIDE) for images in shown], gap=2)

    rows = [[cell(by_class) for by_class in per_task] for per_task in samples.values()]
    picture = labelled(
        rows,
        gap=IMAGE_SIDE // 2,
        names=[textwrap.fill(shorten(name, LONGEST_LABEL), 30) for name in samples],
        columns=[f"after task {task + 1}" for task in range(max(map(len, rows)))],
        title=_classes_title(list(next(iter(samples.values()))[0])),
    )
    save_picture(picture, path)


def _plots(figure: Any, labels: int, *, panels: int) -> list[Any]:
    """Axes of known size, one below the other, high enough for so many labels beside them."""
    height, between = max(PLOT_HEIGHT if panels == 1 else 2.3, LABEL_HEIGHT * labels), 0.35
    figure.set_size_inches(PLOT_WIDTH, panels * height + (panels - 1) * between)
    whole = {"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": between / height}
    every = list(figure.subplots(panels, 1, squeeze=False, gridspec_kw=whole).flat)
    for axes in every:
        axes.grid(axis="y")
    return every


def _mark_places(axes: Any, places: Sequence[float]) -> None:
    mark_places(axes, places)
    margin = 0.03 * max(places[-1] - places[0], 1)
    axes.set_xlim(places[0] - margin, places[-1] + margin)


def _label_lines(
    axes: Any,
    ends: Mapping[str, float],
    *,
    names: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes the names to the right of the axes, each level with the end of its line, or near it where they crowd.

    Args:
        axes: with its limits set.
        ends: strategy -> last value of its line; NaN has its name at the bottom.
        names: all strategies, which fixes each one's look; None: those of `ends`.
        notes: strategy -> what to write after its name.
    """
    names = list(ends) if names is None else names
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    levels = {
        name: -1.0 if math.isnan(value) else to_axes.transform((right, value))[1] for name, value in ends.items()
    }
    order = sorted(levels, key=levels.__getitem__)
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    places = _apart([levels[name] for name in order], LABEL_HEIGHT / height)
    beside = {"transform": axes.transAxes, "clip_on": False}
    for name, place in zip(order, places, strict=True):
        if levels[name] >= 0:
            axes.plot([1.0, 1.04], [levels[name], place], color=GREY, linewidth=0.6, zorder=1, **beside)
        style = Look.of(names.index(name)).style(markersize=4.5)
        axes.plot([1.05, 1.085, 1.12], [place] * 3, markevery=[1], **beside, **style)
        text = shorten(name, LONGEST_LABEL) + (notes or {}).get(name, "")
        axes.text(1.14, place, text, va="center", fontsize=9, **beside)


def _apart(levels: Sequence[float], gap: float) -> list[float]:
    """Rising levels moved as little as it takes to be at least `gap` apart and, as far as they fit, within [0, 1].

    Groups that would overlap are spread around their mean: the least sum of squares, by pooling neighbours.
    """
    groups: list[list[float]] = []
    for place, level in enumerate(levels):
        groups.append([min(max(level, 0.0), 1.0) - place * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    spread = [float(np.mean(group)) for group in groups for _ in group]
    highest = max(0.0, 1.0 - (len(levels) - 1) * gap)
    return [min(max(start, 0.0), highest) + place * gap for place, start in enumerate(spread)]


def coloured_cells(axes: Any, values: np.ndarray, *, highest: float, form: str, size: float | None) -> Any:
    """Draw numbers from 0 to the highest as coloured cells; returns these.

    Args:
        axes: empty.
        values: (rows, columns); NaN has no cell.
        highest: that a number can be.
        form: of the numbers, as of `format`.
        size: of the numbers' letters; None: they are not written.
    """
    cells = axes.imshow(values, cmap="cividis", vmin=0, vmax=highest, interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        if size is not None and not np.isnan(value):
            # cividis rises evenly in lightness, so the middle of its range parts dark from light.
            colour = "white" if value < 0.55 * highest else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", color=colour, fontsize=size)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    return cells


def _matrix_panel(axes: Any, matrix: Sequence[Sequence[float]]) -> Any:
    """One strategy's matrix; returns the coloured cells."""
    tasks = len(matrix)
    values = np.full((tasks, tasks), np.nan)
    for after, row in enumerate(matrix):
        values[after, : after + 1] = row
    written, size = tasks <= MOST_TASKS_WITH_NUMBERS, 8 if tasks <= 6 else 5.5
    cells = coloured_cells(axes, values, highest=100, form=".0f", size=size if written else None)
    step = 1 if written else math.ceil(tasks / 6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, tasks, step), labels=range(1, tasks + 1, step), fontsize=8)
    return cells


def _classes_title(classes: Sequence[str]) -> str:
    shown = [shorten(name) for name in classes[:CLASSES_SHOWN]]
    return f"Samples of {'class' if len(shown) == 1 else 'classes'} {', '.join(shown)} of task 1"


def _check_strategies(argument: str, values: Mapping[str, Any]) -> None:
    if not 1 <= len(values) <= MOST_STRATEGIES:
        raise ValueError(
            f"{argument} has {len(values)} strategies, expected between 1 and {MOST_STRATEGIES}, which can be told apart; "
            "draw them in several figures"
        )


def _check_lengths(argument: str, values: Sequence[Sequence[float]], length: int) -> None:
    if not values or any(len(entries) != length for entries in values):
        raise ValueError(
            f"{argument} has {[len(entries) for entries in values]} entries, expected {length} for each seed, one per task"
        )
