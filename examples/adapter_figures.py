"""Figures of adapters on disk: the rank of F and the coefficients of its functions, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from funlora_hf.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    name_layers,
    new_figure,
)


_GROUPS = tuple(zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK, GREY), "os^DvPX*", strict=True))


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
    if not 1 <= len(ranks) <= len(_GROUPS):
        raise ValueError(
            f"ranks has {len(ranks)} groups, expected between 1 and {len(_GROUPS)}; draw them in several figures"
        )
    for group, by_layer in ranks.items():
        _check_over_classes(f"ranks[{group!r}]", by_layer)
    layers = list(dict.fromkeys(layer for by_layer in ranks.values() for layer in by_layer))
    with new_figure(path, (6.5, 1.6 + max(0.19, 0.07 * len(ranks)) * len(layers))) as figure:
        axes = figure.add_subplot(title=title)
        # Beside each other, so that equal ranks do not hide each other.
        shifts = (np.arange(len(ranks)) - (len(ranks) - 1) / 2) * 0.8 / len(ranks)
        for (group, by_layer), (colour, marker), shift in zip(ranks.items(), _GROUPS, shifts, strict=False):
            means, deviations = zip(*by_layer.values(), strict=True)
            places = [layers.index(layer) + shift for layer in by_layer]
            style = {"color": colour, "markersize": 4, "elinewidth": 1, "capsize": 2, "clip_on": False}
            axes.errorbar(means, places, xerr=deviations, fmt=marker, label=group, **style)
        shared = name_layers(axes, layers)
        axes.set_xlabel(f"numerical rank of F (mean and standard deviation over classes){shared}")
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=10, steps=[1, 2, 5, 10], integer=True)
        axes.grid(axis="x")
        for place in range(1, len(layers)):
            axes.axhline(place - 0.5, color="#EEEEEE", linewidth=0.6, zorder=0)
        # Outside, where it hides no point.
        figure.legend(loc="outside upper center", ncols=min(len(ranks), 4))


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
    height = 0.19 * max(len(layers), 6)
    with new_figure(path, (2.2 + 2.2 * len(panels), 1.6 + height)) as figure:
        if title is not None:
            figure.suptitle(title)
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, by_layer) in zip(row, panels.items(), strict=True):
            values = np.array(list(by_layer.values()), dtype=float)
            # A panel of zeros still needs a scale.
            limit = np.abs(values).max() or 1.0
            cells = axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.set(title=name, xlabel="function, from 1 to p")
            places = range(0, size, math.ceil(size / 10))
            axes.set_xticks(places, labels=[str(place + 1) for place in places])
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            # `pad` is a share of the height.
            scale = figure.colorbar(cells, ax=axes, location="bottom", shrink=0.9, aspect=14, pad=0.05 / height)
            scale.outline.set_visible(False)
        if shared := name_layers(row[0], layers):
            figure.supxlabel(shared.lstrip())


def _check_over_classes(name: str, values: Mapping[str, tuple[float, float]]) -> None:
    if not values:
        raise ValueError(f"{name} is empty, expected at least one layer; compute it first")
    for layer, (mean, deviation) in values.items():
        if not (0 <= mean < math.inf and 0 <= deviation < math.inf):
            raise ValueError(
                f"{name}[{layer!r}] is {(mean, deviation)}, expected a finite mean of at least 0 and a standard deviation "
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
