"""Draws a comparison of strategies of concepts as PNG files from plain data: a row a strategy, so that no legend is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from comparison.figures import COLOURS, coloured_cells
from funlora_hf.evaluation.figures import GREY, GRID_CELL, enlarged, labelled, new_figure, save_picture, shorten


Groups = Mapping[str, Sequence[str]]
"""Heading -> strategies below it, from above."""
Values = Mapping[str, Sequence[float]]
"""Strategy -> numbers, one for each seed or each task; what was not measured is left out."""

# Inches.
_ROW = 0.22
_PANEL = 1.65
_CELL = 0.42
_LETTER = 0.075


@dataclass(frozen=True)
class Panel:
    """One axis of a comparison, on which better is to the right.

    Args:
        title: of the axis.
        measure: what it is measured by.
        values: of each seed, drawn as a dot at their mean and a line from the lowest to the highest.
        rings: of each seed by a second measure, drawn as a ring.
        marks: numbers to compare with, by name, drawn as grey lines.
    """

    title: str
    measure: str
    values: Values
    rings: Values = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)


def axes_figure(groups: Groups, panels: Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """Draw panels side by side, with the same row for a strategy in each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = list(_rows(groups))
    with new_figure(path, (_width_of_names(rows) + _PANEL * len(panels), 1.3 + _ROW * len(rows))) as figure:
        every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        _name_rows(every[0], rows)
        for axes, panel in zip(every, panels, strict=True):
            axes.set_title(panel.title, fontsize=10, fontweight="bold", pad=16)
            axes.set_xlabel(panel.measure, fontsize=8.5)
            axes.grid()
            axes.tick_params(axis="y", length=0)
            for name, place in panel.marks.items():
                axes.axvline(place, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
                axes.annotate(
                    name, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                    color=GREY, fontsize=8, ha="center",
                )  # fmt: skip
            for y, (label, group) in enumerate(rows):
                if group is not None:
                    _draw_dot(axes, y, panel.rings.get(label), COLOURS[group], filled=False)
                    _draw_dot(axes, y, panel.values.get(label), COLOURS[group], filled=True)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.03), max(high, 1.03))
        figure.supxlabel("better: to the right; lines: from the lowest to the highest seed", fontsize=8.5, color=GREY)


def scores_figure(groups: Groups, scores: Values, path: str | os.PathLike[str], *, title: str) -> None:
    """Draw a strategy's score after each task as a row of cells with numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = list(_rows(groups))
    tasks = max(map(len, scores.values()))
    cells = np.full((len(rows), tasks), np.nan)
    for y, (label, _) in enumerate(rows):
        cells[y, : len(scores.get(label, ()))] = scores.get(label, ())
    with new_figure(path, (_width_of_names(rows) + _CELL * tasks, 0.8 + _ROW * len(rows))) as figure:
        axes = figure.add_subplot(xlabel="concepts learned")
        coloured_cells(axes, cells, highest=1, form=".2f", size=8)
        axes.set_aspect("auto")
        _name_rows(axes, rows)
        axes.set_xticks(range(tasks), labels=range(1, tasks + 1))
        axes.set_title(title, fontsize=10, loc="left")


def samples_figure(samples: Mapping[str, Tensor], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw an image after each task: a row a strategy, uint8 (tasks, C, H, W), range 0..255. Needs no matplotlib."""
    rows = [enlarged(images, GRID_CELL) for images in samples.values()]
    columns = [str(task + 1) for task in range(max(map(len, rows)))]
    picture = labelled(rows, gap=4, names=[shorten(name) for name in samples], columns=columns, title=title)
    save_picture(picture, path)


def _draw_dot(axes: Any, y: int, of_seeds: Sequence[float] | None, colour: str, *, filled: bool) -> None:
    """Draw the mean, and a line from the lowest to the highest; nothing if there is none."""
    if of_seeds:
        axes.plot([min(of_seeds), max(of_seeds)], [y, y], color=colour, linewidth=1.4, clip_on=False)
        face = {"color": colour, "markerfacecolor": colour if filled else "white"}
        axes.plot(fmean(of_seeds), y, "o", markersize=5.5, zorder=3, clip_on=False, **face)


def _rows(groups: Groups) -> Iterator[tuple[str, int | None]]:
    """Give what stands in each row, from above: strategies with the number of their group, and headings with None."""
    for group, (heading, labels) in enumerate(groups.items()):
        yield heading, None
        yield from ((label, group) for label in labels)


def _width_of_names(rows: Sequence[tuple[str, int | None]]) -> float:
    """Return the inches that the names take."""
    return _LETTER * max(len(shorten(name)) for name, _ in rows)


def _name_rows(axes: Any, rows: Sequence[tuple[str, int | None]]) -> None:
    """Write the names beside the rows, and the headings above theirs."""
    axes.set_yticks(range(len(rows)), labels=[shorten(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for text, (_, group) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if group is None else "normal")
