"""Draw the figures of a run as PNG files from plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw
from torch import Tensor

from ..utils.files import whole_file
from .label_font import drawable, label_font


# Okabe and Ito's colours, which can be told apart with every common kind of colour blindness.
BLUE = "#0072B2"
SKY_BLUE = "#56B4E9"
VERMILION = "#D55E00"
BLACK = "#000000"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
GREY = "#7F7F7F"

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "figure.labelsize": 10,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
DPI = 150
# Side, in pixels, that one image of the grid should reach: small images are enlarged by a whole factor.
GRID_CELL = 64
# A grid of many classes is tall, so its images are smaller.
GRID_CELL_OF_MANY = 32
MANY_CLASSES = 20
IMAGES_IN_ROW = 10
MOST_IN_LEGEND = 10
# Size in pixels of the letters beside and above a grid.
LABEL_SIZE = 18
# A label with more characters loses its middle.
LONGEST_LABEL = 40


def sample_grid(images_by_class: Mapping[str, Tensor], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw one row of up to ten images per class, with the name of the class on the left. Needs no matplotlib.

    Small images are enlarged by a whole factor, each pixel to a square, so that nothing is smoothed.

    Args:
        images_by_class: class name -> uint8 (N, C, H, W), range 0..255, C = 1 or 3, the same C, H, W for every class;
            rows appear in the order of the mapping. A class with fewer images than columns leaves the rest white.
        path: the PNG to write; a missing folder is created.
    """
    side = GRID_CELL if len(images_by_class) <= MANY_CLASSES else GRID_CELL_OF_MANY
    rows = [enlarged(images[:IMAGES_IN_ROW], side) for images in images_by_class.values()]
    names = [shorten(name) for name in images_by_class]
    save_picture(labelled(rows, gap=max(2, len(rows[0][0]) // 16), names=names, title=title), path)


def image_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int, names: Sequence[str] = ()) -> None:
    """Write the picture of `image_grid_picture` as a PNG. Equal images give equal bytes. Raises the same errors."""
    save_picture(image_grid_picture(images, columns=columns, names=names), path)


def image_grid_picture(
    images: Tensor, *, columns: int, names: Sequence[str] = (), headings: Sequence[str] = ()
) -> PIL.Image.Image:
    """Draw images row by row, each on white, as an RGB image. Needs no matplotlib.

    Small images are enlarged by a whole factor, each pixel to a square. The names of rows are on the left, the headings of
    columns above.

    Raises:
        ValueError: the images are not uint8 (N, C, H, W), N of at least 1 and C of 1 or 3.
    """
    check_images("images", images)
    pictures = enlarged(images, GRID_CELL)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return labelled(rows, gap=2, names=[shorten(name) for name in names], columns=headings)


def accuracy_curve(
    average_accuracies: Sequence[float],
    path: str | os.PathLike[str],
    *,
    classes_seen: Sequence[int],
    label: str,
    joint: Sequence[float] | None = None,
) -> None:
    """Draw the average accuracy after each task against the number of classes seen.

    The accuracy axis ends at 100 and starts at 0, unless every value is above 80: then it starts at the multiple of
    5 below the lowest value, which the lowest tick and the name of the axis both show.

    Args:
        average_accuracies: `A[t]` after each task. Unit: %, range [0, 100].
        path: the PNG to write; a missing folder is created.
        classes_seen: number of classes seen after each task, increasing; as long as `average_accuracies`.
        joint: accuracy after each task of training on the real images of all classes seen, the upper bound, drawn as
            a dashed line; as long as `average_accuracies`. Unit: %, range [0, 100].

    Raises:
        ImportError: matplotlib is not installed.

    Source: the quantities, arXiv 2510.02631, evaluation protocol [text]; the drawing [ours].
    """
    lowest = min([*average_accuracies, *(joint or [])])
    bottom = 5 * math.floor((lowest - 0.5) / 5) if lowest > 80 else 0
    # Markers crowd a line of many tasks.
    size = 5 if len(classes_seen) <= 20 else 3
    with new_figure(path, (5.5, 3.6)) as figure:
        axes = figure.add_subplot(ylim=(bottom, 100), xlabel="classes seen")
        axes.set_ylabel("average accuracy (%)" if bottom == 0 else f"average accuracy (%), from {bottom}")
        axes.grid(axis="y")
        if joint is not None:
            style = {"color": VERMILION, "markersize": size - 1, "clip_on": False}
            axes.plot(classes_seen, joint, "s--", label="joint (upper bound)", **style)
        axes.plot(classes_seen, average_accuracies, "o-", color=BLUE, markersize=size, label=label, clip_on=False)
        mark_places(axes, classes_seen)
        axes.legend()


def loss_curves(losses: Mapping[str, Sequence[float | None]], path: str | os.PathLike[str]) -> None:
    """Draw the training loss of each phase over its course: means over equal parts of it, None for a part without one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with new_figure(path, (5.5, 3.6)) as figure:
        axes = figure.add_subplot(xlabel="share of the phase (%)", ylabel="training loss")
        axes.grid(axis="y")
        for name, means in losses.items():
            places = [100 * (index + 0.5) / len(means) for index in range(len(means))]
            values = [math.nan if mean is None else mean for mean in means]
            axes.plot(places, values, ".-", label=name, linewidth=1, markersize=3)
        axes.set_ylim(bottom=0)
        if len(losses) <= MOST_IN_LEGEND:
            axes.legend(ncols=2, fontsize=8)


def drift_curves(
    by_task: Sequence[Mapping[str, Mapping[str, float | None]] | None],
    real: Mapping[str, Mapping[str, float | None]],
    path: str | os.PathLike[str],
    *,
    tasks: Sequence[Sequence[int]],
) -> None:
    """Draw how far the samples of each task's classes are from their real images after each task; all as `RunEvaluator.drift`.

    Each line is the mean over the classes of one task; the dashed line is that of real images against real ones. `tasks` has the class
    ids of each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = {
        "mean": "distance of means (spreads)",
        "covariance": "distance of covariances (relative)",
        "accuracy": "found to be of the class (%)",
    }
    with new_figure(path, (10.5, 3.4)) as figure:
        import matplotlib

        colours = matplotlib.colormaps["viridis"].resampled(len(tasks) + 1)
        for place, (key, label) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), place, xlabel="after task", ylabel=label)
            axes.grid(axis="y")
            chance = _mean_of(real, list(real), key)
            axes.axhline(chance, color=GREY, linestyle="--", label="real images")
            for learned, classes in enumerate(tasks):
                means = [math.nan if row is None else _mean_of(row, map(str, classes), key) for row in by_task]
                places = range(1, len(means) + 1)
                style = {"color": colours(learned), "markersize": 4, "clip_on": False}
                axes.plot(places, means, "o-", label=f"task {learned + 1}", **style)
            mark_places(axes, range(1, len(by_task) + 1))
            axes.set_ylim(0, 100 if key == "accuracy" else None)
        if len(tasks) <= MOST_IN_LEGEND:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", title="classes of")


def layer_importance(
    importance: Mapping[str, tuple[float, float]], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Draw the importance of each layer as a horizontal bar, first layer on top.

    Beginnings and ends that all names share are left out, and written once below the axis instead.

    Args:
        importance: layer name -> (mean, standard deviation over the classes), no unit. Bars appear in the order of the
            mapping, which should be the order of execution.
        path: the PNG to write; a missing folder is created.

    Raises:
        ImportError: matplotlib is not installed.

    Source: the quantity, arXiv 2510.02631, layer importance [text]; the drawing [ours].
    """
    with new_figure(path, (6.5, 1.2 + 0.19 * len(importance))) as figure:
        axes = figure.add_subplot(title=title)
        means, deviations = zip(*importance.values(), strict=True)
        errors = {"ecolor": BLACK, "elinewidth": 1, "capsize": 2}
        axes.barh(range(len(means)), means, xerr=deviations, height=0.7, color=SKY_BLUE, error_kw=errors)
        shared = name_layers(axes, list(importance))
        axes.set_xlabel(f"importance (mean and standard deviation over classes){shared}")
        axes.set_ylim(len(means) - 0.4, -0.6)
        axes.grid(axis="x")


@contextmanager
def new_figure(
    path: str | os.PathLike[str], size: tuple[float, float], *, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Any]:
    """Give a matplotlib figure in `STYLE`; if the block ends without an error, write a whole PNG on white, cropped to its content.

    `size` is width and height in inches; without a layout, the axes stay where they are placed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the path does not end in .png.
    """
    target = _png_path(path)
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('figures need matplotlib; install it with: pip install "funlora-hf[demo]"') from error
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=size, dpi=DPI, layout=layout)
        yield figure
        with whole_file(target) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")


def save_picture(picture: PIL.Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture whole or not at all. Raises a ValueError for a path that does not end in .png."""
    with whole_file(_png_path(path)) as temporary:
        picture.save(temporary, format="png")


def labelled(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    gap: int,
    names: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str | None = None,
) -> PIL.Image.Image:
    """Return pictures as `on_white` places them, with labels in a font that has their characters, as an RGB image.

    The names of rows are on the left, those of columns above; the edge is half as wide as the gap, which is in pixels.
    """
    font = label_font([*names, *columns, title or ""], LABEL_SIZE)
    names, columns = ([drawable(text, font) for text in texts] for texts in (names, columns))
    title = drawable(title or "", font)
    pixels = on_white(rows, gap=gap)
    height, width = pixels.shape[:2]
    edge, space = gap // 2, LABEL_SIZE // 2
    measure = ImageDraw.Draw(PIL.Image.new("1", (1, 1)))
    widest = max((measure.multiline_textbbox((0, 0), name, font)[2] for name in names), default=0)
    left = math.ceil(widest) + 2 * space if names else edge
    lines = (LABEL_SIZE + space) * (bool(title) + bool(columns))
    top = lines + edge
    # Make room on the right for a title that is longer than a narrow grid.
    right = max(width + edge, math.ceil(font.getlength(title)) + space if title else 0)
    canvas = PIL.Image.new("RGB", (left + right, top + height + edge), "white")
    canvas.paste(PIL.Image.fromarray(pixels), (left, top))
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((left, LABEL_SIZE), title, "black", font, anchor="ls")
    for place, name in enumerate(columns):
        pitch = (width + gap) / len(columns)
        draw.text((left + (place + 0.5) * pitch - gap / 2, lines - space), name, "black", font, anchor="ms")
    for place, name in enumerate(names):
        pitch = (height + gap) / len(names)
        middle = (left - space, top + (place + 0.5) * pitch - gap / 2)
        draw.multiline_text(middle, name, "black", font, anchor="rm", align="right")
    return canvas


def enlarged(images: Tensor, side: int) -> list[np.ndarray]:
    """Enlarge images, uint8 (N, C, H, W), to N of (height, width, 3), by the whole factor that brings the longer side nearest to `side`."""
    factor = max(1, round(side / max(images.shape[2:])))
    pixels = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return list(pixels.repeat(factor, axis=1).repeat(factor, axis=2))


def on_white(rows: Sequence[Sequence[np.ndarray]], *, gap: int) -> np.ndarray:
    """Place pictures, uint8 (height, width, 3), in rows and columns of one; each cell is as large as the largest picture."""
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def mark_places(axes: Any, places: Sequence[float]) -> None:
    """Write the places on the horizontal axis: all of them if they are few, round numbers otherwise."""
    if len(places) <= 12:
        axes.set_xticks(list(places))
    else:
        axes.locator_params(axis="x", nbins=10, steps=[1, 2, 5, 10], integer=True)


def name_layers(axes: Any, layers: list[str]) -> str:
    """Write the names of the layers at 0, 1, ... of the vertical axis; returns a line on what all names share, or ""."""
    names, shared = _without_shared_parts(layers)
    axes.set_yticks(range(len(names)), labels=[shorten(name) for name in names], fontsize=8)
    axes.tick_params(axis="y", length=0)
    # The long label needs the height of several rows.
    axes.set_ylabel("layer, in order of execution" if len(names) >= 10 else "layer")
    return f"\nlayers: {shared}" if shared else ""


def _mean_of(rows: Mapping[str, Mapping[str, float | None]], classes: Iterable[str], key: str) -> float:
    """Return the mean of a measure over the classes that have it; NaN if none has."""
    values = [value for c in classes if c in rows and (value := rows[c][key]) is not None]
    return fmean(values) if values else math.nan


def _png_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path is {str(target)!r}, expected a name ending in .png; only PNG is written")
    return target


def check_images(name: str, images: Tensor) -> None:
    """Raise a ValueError unless the images are uint8 `(N, C, H, W)`, N of at least 1 and C of 1 or 3."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} is {images.dtype} {tuple(images.shape)}, expected uint8 (N, C, H, W) with N of at least 1 and C of 1 or 3; "
            "leave the class out or convert its images"
        )


def shorten(name: str, length: int = LONGEST_LABEL) -> str:
    """Put a name on one line; one longer than `length` loses its middle, since both ends tell names apart."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    kept = (length - 1) // 2
    return f"{name[:kept]}…{name[-kept:]}"


def _without_shared_parts(names: list[str]) -> tuple[list[str], str]:
    """Strip the dotted parts that all names share at their beginning and end.

    Returns:
        The stripped names, and what was stripped as "prefix.*.suffix" ("" if nothing was).
    """
    parts = [name.split(".") for name in names]
    # At least one part of the shortest name stays.
    spare = min(len(part) for part in parts) - 1 if len(names) > 1 else 0
    start = min(spare, len(os.path.commonprefix(parts)))  # noqa: RUF071 - of lists, entry by entry
    # "2.resnets.0" does not read as a name, so a number keeps the part before it.
    while start and any(part[start].isdigit() for part in parts):
        start -= 1
    end = min(spare - start, len(os.path.commonprefix([part[::-1] for part in parts])))  # noqa: RUF071
    stripped = [".".join(part[start : len(part) - end]) for part in parts]
    first = parts[0]
    shared = [*first[:start], "*", *first[len(first) - end :]]
    return stripped, ".".join(shared) if start or end else ""
