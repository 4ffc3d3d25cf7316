"""Draws the figures of a run as PNG files from plain data."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import make_image_grid
from torch import Tensor

from ..utils.files import whole_file


# Okabe and Ito's colours, told apart with every common kind of colour blindness.
BLUE = "#0072B2"
SKY_BLUE = "#56B4E9"
VERMILION = "#D55E00"
BLACK = "#000000"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
GREY = "#7F7F7F"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
DPI = 150
GRID_COLOUR = "#DDDDDD"
# Side, in pixels, that one image of the grid should reach; small images are enlarged by a whole factor up to it.
GRID_CELL = 64
# A grid of many classes is tall: its images are kept smaller.
GRID_CELL_OF_MANY = 32
MANY_CLASSES = 20
# Images of one class in a grid of its own, and their columns.
CLASS_GRID_IMAGES = 16
CLASS_GRID_COLUMNS = 4
# Characters of a label after which its middle is left out.
LONGEST_LABEL = 40


def sample_grid(
    images_by_class: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    images_per_class: int = 10,
) -> None:
    """Draws one row of images per class, with the name of the class on the left.

    Small images are enlarged by a whole factor, each pixel to a square, so that nothing is smoothed over.

    Args:
        images_by_class: class name -> uint8 (N, C, H, W), range 0..255, C = 1 or 3, the same C, H, W for every class;
            rows appear in the order of the mapping. A class with fewer images than columns leaves the rest white.
        path: the PNG to write; its folder is made if it is missing.
        title: text above the grid.
        images_per_class: most images in a row; the first ones are taken.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is not as described; the message names it.

    Source: [ours].
    """
    if isinstance(images_per_class, bool) or not isinstance(images_per_class, int) or images_per_class < 1:
        raise ValueError(f"images_per_class is {images_per_class!r}, expected an integer of at least 1; try 10")
    canvas, cell = _grid_canvas(images_by_class, images_per_class=images_per_class)
    target = png_path(path)
    matplotlib = import_matplotlib()
    height, width = canvas.shape[:2]
    with matplotlib.rc_context(STYLE):
        # The axes fill the figure pixel for pixel, so nothing is resampled; the names lie outside, and the tight
        # bounding box at saving makes room for them.
        figure = matplotlib.figure.Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        pitch = cell + gap_between(cell)
        axes.set_yticks(
            [row * pitch + (cell - 1) / 2 for row in range(len(images_by_class))],
            labels=[shorten(name) for name in images_by_class],
        )
        axes.set_xticks([])
        axes.tick_params(length=0, pad=6)
        axes.spines[:].set_visible(False)
        if title is not None:
            # Left-aligned, so that a title longer than a narrow grid does not run over the names.
            axes.set_title(title, loc="left", pad=8)
        save_figure(figure, target)


def class_grid(images: Tensor, path: str | os.PathLike[str]) -> None:
    """Draws up to 16 images of one class in four columns, each on white. Needs no matplotlib.

    Small images are enlarged by a whole factor, each pixel to a square. Equal images give equal bytes.

    Args:
        images: uint8 (N, C, H, W), range 0..255, C = 1 or 3; the first 16 are taken.
        path: the PNG to write; its folder is made if it is missing.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Source: [ours].
    """
    check_images("images", images)
    image_grid(images[:CLASS_GRID_IMAGES], path, columns=CLASS_GRID_COLUMNS)


def image_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int) -> None:
    """Draws images row by row, each on white. Needs no matplotlib.

    Small images are enlarged by a whole factor, each pixel to a square. Equal images give equal bytes.

    Args:
        images: uint8 (N, C, H, W), range 0..255, C = 1 or 3.
        path: the PNG to write; its folder is made if it is missing.
        columns: images in a row.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Source: [ours].
    """
    check_images("images", images)
    target = png_path(path)
    _, _, height, width = images.shape
    factor = max(1, round(GRID_CELL / max(height, width)))
    tiles = [_tile(image, factor) for image in images]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    blank = PIL.Image.new("RGB", tiles[0].size, "white")
    grid = make_image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)
    with whole_file(target) as temporary:
        grid.save(temporary, format="png")


def _tile(image: Tensor, factor: int) -> PIL.Image.Image:
    """An image, uint8 (C, H, W), enlarged and with a white edge."""
    # Of grey images, PIL wants no channel.
    pixels = image.cpu().permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.cpu().permute(1, 2, 0)
    picture = PIL.Image.fromarray(pixels.numpy()).convert("RGB")
    picture = PIL.ImageOps.scale(picture, factor, PIL.Image.Resampling.NEAREST)
    return PIL.ImageOps.expand(picture, border=1, fill="white")


def accuracy_curve(
    average_accuracies: Sequence[float],
    path: str | os.PathLike[str],
    *,
    classes_seen: Sequence[int],
    label: str = "funlora",
    joint: Sequence[float] | None = None,
    title: str | None = None,
) -> None:
    """Draws the average accuracy after each task against the number of classes seen.

    The accuracy axis ends at 100 and starts at 0, unless every value is above 80: then it starts at the multiple of
    5 below the lowest value, which the lowest tick and the name of the axis both say.

    Args:
        average_accuracies: `A[t]` after each task. Unit: %, range [0, 100].
        path: the PNG to write; its folder is made if it is missing.
        classes_seen: number of classes seen after each task, increasing; as long as `average_accuracies`.
        label: name of the method in the legend.
        joint: accuracy after each task of training on the real images of all classes seen, the upper bound, drawn as
            a dashed line; as long as `average_accuracies`. Unit: %, range [0, 100].
        title: text above the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is not as described; the message names it.

    Source: the quantities, arXiv 2510.02631, evaluation protocol [text]; the drawing [ours].
    """
    _check_percentages("average_accuracies", average_accuracies, length=len(classes_seen))
    if joint is not None:
        _check_percentages("joint", joint, length=len(classes_seen))
    if any(later <= earlier for earlier, later in itertools.pairwise(classes_seen)):
        raise ValueError(
            f"classes_seen is {list(classes_seen)}, expected increasing numbers; count the classes so far"
        )
    target = png_path(path)
    matplotlib = import_matplotlib()
    lowest = min([*average_accuracies, *(joint or [])])
    bottom = 5 * math.floor((lowest - 0.5) / 5) if lowest > 80 else 0
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(5.5, 3.6), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        # Markers crowd a line of many tasks.
        marker_size = 5 if len(classes_seen) <= 20 else 3
        axes.set_ylim(bottom, 100)
        axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.6)
        axes.set_axisbelow(True)
        if joint is not None:
            axes.plot(
                classes_seen,
                joint,
                color=VERMILION,
                linestyle="--",
                marker="s",
                markersize=marker_size - 1,
                label="joint (upper bound)",
                clip_on=False,
            )
        axes.plot(
            classes_seen,
            average_accuracies,
            color=BLUE,
            marker="o",
            markersize=marker_size,
            label=label,
            clip_on=False,
        )
        if len(classes_seen) <= 12:
            axes.set_xticks(list(classes_seen))
        else:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("classes seen")
        axes.set_ylabel("average accuracy (%)" if bottom == 0 else f"average accuracy (%), from {bottom}")
        if title is not None:
            axes.set_title(title)
        axes.legend(loc="best")
        save_figure(figure, target)


def layer_importance(
    importance: Mapping[str, tuple[float, float]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    xlabel: str = "importance (mean and standard deviation over classes)",
) -> None:
    """Draws the importance of each layer as a horizontal bar, first layer on top.

    Beginnings and ends that all names share are left out, and written once below the axis instead.

    Args:
        importance: layer name -> (mean, standard deviation over the classes), finite, the second not negative; no
            unit. Bars appear in the order of the mapping, which should be that of execution.
        path: the PNG to write; its folder is made if it is missing.
        title: text above the axes.
        xlabel: what the bars show, with its unit if it has one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is not as described; the message names it.

    Source: the quantity, arXiv 2510.02631, layer importance [text]; the drawing [ours].
    """
    _check_over_classes("importance", importance)
    target = png_path(path)
    matplotlib = import_matplotlib()
    means = [mean for mean, _ in importance.values()]
    deviations = [deviation for _, deviation in importance.values()]
    names, shared = _without_shared_parts(list(importance))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(6.5, 1.2 + 0.19 * len(names)), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.barh(
            range(len(names)),
            means,
            xerr=deviations,
            height=0.7,
            color=SKY_BLUE,
            error_kw={"ecolor": BLACK, "elinewidth": 1, "capsize": 2},
        )
        _name_layers(axes, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", color=GRID_COLOUR, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{xlabel}\nlayers: {shared}" if shared else xlabel)
        if title is not None:
            axes.set_title(title)
        save_figure(figure, target)


def rank_by_layer(
    ranks: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Draws the rank of the functional matrix in each layer as a point, one colour and marker per group.

    Beginnings and ends that all names of layers share are left out, and written once below the axis instead.

    Args:
        ranks: group, such as the function -> layer name -> (mean, standard deviation over the classes), finite, neither
            negative; no unit. At most eight groups. Layers appear in the order of the first group that has them, which
            should be that of execution; a group may lack layers.
        path: the PNG to write; its folder is made if it is missing.
        title: text above the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is not as described; the message names it.

    Source: the quantity, arXiv 2510.02631, Figure 4 [text]; the drawing [ours].
    """
    looks = (
        (BLUE, "o"),
        (VERMILION, "s"),
        (GREEN, "^"),
        (ORANGE, "D"),
        (PURPLE, "v"),
        (SKY_BLUE, "P"),
        (BLACK, "X"),
        (GREY, "*"),
    )
    if not 1 <= len(ranks) <= len(looks):
        raise ValueError(
            f"ranks has {len(ranks)} groups, expected between 1 and {len(looks)}; draw them in several figures"
        )
    for group, by_layer in ranks.items():
        _check_over_classes(f"ranks[{group!r}]", by_layer, lowest=0)
    target = png_path(path)
    matplotlib = import_matplotlib()
    layers = list(dict.fromkeys(layer for by_layer in ranks.values() for layer in by_layer))
    names, shared = _without_shared_parts(layers)
    # Beside each other, so that equal ranks do not hide each other.
    step = 0.8 / len(ranks)
    height = max(0.19, 0.07 * len(ranks))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(6.5, 1.6 + height * len(layers)), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        for index, ((group, by_layer), (colour, marker)) in enumerate(zip(ranks.items(), looks, strict=False)):
            shift = (index - (len(ranks) - 1) / 2) * step
            axes.errorbar(
                [mean for mean, _ in by_layer.values()],
                [layers.index(layer) + shift for layer in by_layer],
                xerr=[deviation for _, deviation in by_layer.values()],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle="none",
                elinewidth=1,
                capsize=2,
                label=group,
                clip_on=False,
            )
        _name_layers(axes, names)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
        axes.grid(axis="x", color=GRID_COLOUR, linewidth=0.6)
        boundaries = [place - 0.5 for place in range(1, len(layers))]
        axes.hlines(boundaries, 0, 1, transform=axes.get_yaxis_transform(), color="#EEEEEE", linewidth=0.6, zorder=0)
        axes.set_axisbelow(True)
        label = "numerical rank of F (mean and standard deviation over classes)"
        axes.set_xlabel(f"{label}\nlayers: {shared}" if shared else label)
        # Outside, where it hides no point.
        figure.legend(loc="outside upper center", ncols=min(len(ranks), 4))
        if title is not None:
            axes.set_title(title)
        save_figure(figure, target)


def coefficients_by_layer(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Draws the coefficients of the p functions in each layer as coloured cells, one panel per quantity.

    Zero is white in every panel; each panel has a colour scale of its own, as wide below zero as above.

    Args:
        panels: name of a quantity, such as "alpha" -> layer name -> its p values, finite; no unit. The same layers, in
            the same order (that of execution), and the same p in every panel.
        path: the PNG to write; its folder is made if it is missing.
        title: text above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is not as described; the message names it.

    Source: the quantities, arXiv 2510.02631, Figure 5 [text]; the drawing [ours].
    """
    layers, size = _check_panels(panels)
    target = png_path(path)
    matplotlib = import_matplotlib()
    names, shared = _without_shared_parts(layers)
    with matplotlib.rc_context(STYLE):
        height = 0.19 * max(len(layers), 6)
        figure = matplotlib.figure.Figure(
            figsize=(2.2 + 2.2 * len(panels), 1.6 + height), dpi=DPI, layout="constrained"
        )
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, by_layer) in zip(row, panels.items(), strict=True):
            values = np.array([by_layer[layer] for layer in layers], dtype=float)
            # A panel of zeros still needs a scale.
            limit = np.abs(values).max() or 1.0
            cells = axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            places = range(0, size, math.ceil(size / 10))
            axes.set_xticks(places, labels=[str(place + 1) for place in places])
            axes.set_xlabel("function, from 1 to p")
            axes.set_title(name)
            # `pad` is a share of the height.
            scale = figure.colorbar(cells, ax=axes, location="bottom", shrink=0.9, aspect=14, pad=0.05 / height)
            scale.outline.set_visible(False)
        _name_layers(row[0], names)
        if shared:
            figure.supxlabel(f"layers: {shared}", fontsize=STYLE["axes.labelsize"])
        if title is not None:
            figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        save_figure(figure, target)


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """Writes the names of the layers at 0, 1, ... of the vertical axis."""
    axes.set_yticks(range(len(names)), labels=[shorten(name) for name in names], fontsize=8)
    axes.tick_params(axis="y", length=0)
    # The long name needs the height of several rows.
    axes.set_ylabel("layer, in order of execution" if len(names) >= 10 else "layer")


def _check_over_classes(name: str, values: Mapping[str, tuple[float, float]], *, lowest: float = -math.inf) -> None:
    if not values:
        raise ValueError(f"{name} is empty, expected at least one layer; compute it first")
    for layer, (mean, deviation) in values.items():
        if not (math.isfinite(mean) and mean >= lowest and math.isfinite(deviation) and deviation >= 0):
            of_at_least = f" of at least {lowest:g}" if math.isfinite(lowest) else ""
            raise ValueError(
                f"{name}[{layer!r}] is {(mean, deviation)}, expected a finite mean{of_at_least} and a standard deviation "
                f"of at least 0; check the adapters it was computed from"
            )


def _check_panels(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[list[str], int]:
    """Returns the layers and the number of values a layer."""
    if not panels:
        raise ValueError("panels is empty, expected at least one quantity; compute the coefficients first")
    layers = list(next(iter(panels.values())))
    if not layers:
        raise ValueError("panels has a quantity of no layer, expected at least one; compute the coefficients first")
    size = len(next(iter(panels.values()))[layers[0]])
    for name, by_layer in panels.items():
        if list(by_layer) != layers:
            raise ValueError(f"panels[{name!r}] has other layers than the first; give all quantities of all layers")
        for layer, values in by_layer.items():
            if len(values) != size or size == 0 or not all(math.isfinite(value) for value in values):
                raise ValueError(
                    f"panels[{name!r}][{layer!r}] is {list(values)}, expected {size or 'some'} finite numbers, one per "
                    f"function; check the adapters it was computed from"
                )
    return layers, size


def import_matplotlib() -> ModuleType:
    """Returns matplotlib with the parts used here, or says which extra brings it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('figures need matplotlib; install it with: pip install "funlora-hf[demo]"') from error
    return matplotlib


def png_path(path: str | os.PathLike[str]) -> Path:
    """The path of a figure. Raises a ValueError if it does not end in .png."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path is {str(target)!r}, expected a name ending in .png; only PNG is written")
    return target


def save_figure(figure: Any, target: Path) -> None:
    """Writes a matplotlib figure as a whole PNG on white, cut to what it shows."""
    with whole_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1, facecolor="white")


def gap_between(cell: int) -> int:
    """Pixels between the images of a grid whose images are `cell` pixels high."""
    return max(2, cell // 16)


def _grid_canvas(images_by_class: Mapping[str, Tensor], *, images_per_class: int) -> tuple[np.ndarray, int]:
    """Lays the images out on white.

    Args:
        images_by_class: see `sample_grid`.
        images_per_class: most images in a row.

    Returns:
        The canvas, uint8 (height, width, 3), range 0..255, and the height of one image on it in pixels.
    """
    if not images_by_class:
        raise ValueError("images_by_class is empty, expected at least one class; sample some images first")
    shapes = set()
    for name, images in images_by_class.items():
        check_images(f"images_by_class[{name!r}]", images)
        shapes.add(tuple(images.shape[1:]))
    if len(shapes) > 1:
        raise ValueError(
            f"images_by_class has images of shapes {sorted(shapes)}, expected one shape; resize them first"
        )
    _, height, width = shapes.pop()
    side = GRID_CELL if len(images_by_class) <= MANY_CLASSES else GRID_CELL_OF_MANY
    factor = max(1, round(side / max(height, width)))
    columns = min(images_per_class, max(len(images) for images in images_by_class.values()))
    cell_height, cell_width = height * factor, width * factor
    gap = gap_between(cell_height)
    canvas = np.full(
        (len(images_by_class) * (cell_height + gap) - gap, columns * (cell_width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for row, images in enumerate(images_by_class.values()):
        for column, image in enumerate(images[:columns].cpu().permute(0, 2, 3, 1).numpy()):
            top, left = row * (cell_height + gap), column * (cell_width + gap)
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            # A grey image is broadcast over the three channels.
            canvas[top : top + cell_height, left : left + cell_width] = enlarged
    return canvas, cell_height


def check_images(name: str, images: Tensor) -> None:
    """Raises a ValueError unless the images are uint8 `(N, C, H, W)`, N of at least 1 and C of 1 or 3."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} is {found}, expected uint8 (N, C, H, W); convert it first")
    if len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}, expected (N, C, H, W) with N of at least 1 and C of 1 or 3; leave "
            "the class out or convert its images"
        )


def _check_percentages(name: str, values: Sequence[float], *, length: int) -> None:
    if len(values) == 0 or len(values) != length:
        raise ValueError(
            f"{name} has {len(values)} entries and classes_seen has {length}, expected one per task in both, at least "
            f"one; give both for the same tasks"
        )
    for place, value in enumerate(values):
        # The comparison is also false for NaN.
        if not 0 <= value <= 100:
            raise ValueError(f"{name}[{place}] is {value!r}, expected a number in [0, 100]; accuracies are in %")


def shorten(name: str, length: int = LONGEST_LABEL) -> str:
    """Leaves out the middle of a name of more characters than `length`, since both ends tell names apart."""
    if len(name) <= length:
        return name
    kept = (length - 1) // 2
    return f"{name[:kept]}…{name[-kept:]}"


def _without_shared_parts(names: list[str]) -> tuple[list[str], str]:
    """Strips the dotted parts that all names share at their beginning and end.

    Returns:
        The stripped names, and what was stripped as "prefix.*.suffix" ("" if nothing was).
    """
    parts = [name.split(".") for name in names]
    # At least one part of the shortest name stays.
    spare = min(len(part) for part in parts) - 1 if len(names) > 1 else 0
    start = 0
    while start < spare and len({part[start] for part in parts}) == 1:
        start += 1
    # "2.resnets.0" does not read as a name, so a number keeps the part before it.
    while start and any(part[start].isdigit() for part in parts):
        start -= 1
    end = 0
    while end < spare - start and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    stripped = [".".join(part[start : len(part) - end]) for part in parts]
    if start == end == 0:
        return stripped, ""
    first = parts[0]
    return stripped, ".".join([*first[:start], "*", *first[len(first) - end :]])
