"""The figures of ranks and coefficients: whole PNG files, with the right content."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from adapter_figures import coefficients_by_layer, rank_by_layer
from pictures import LAYERS, check, ticks


@pytest.mark.parametrize(("layers", "groups"), [(1, 1), (15, 8), (65, 2)])
def test_ranks_are_a_png(tmp_path, saved_figures, layers, groups):
    ranks = {f"group {g}": dict.fromkeys(LAYERS[:layers], (g + 1.0, 0.5)) for g in range(groups)}
    rank_by_layer(ranks, tmp_path / "ranks.png", title="digits")
    check(tmp_path / "ranks.png")
    axes = saved_figures[0].axes[0]
    assert len(ticks(axes.yaxis)) == len(set(ticks(axes.yaxis))) == layers
    assert axes.get_title() == "digits"
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


def test_ranks_content(tmp_path, saved_figures):
    rank_by_layer(
        {
            "cosine": {"conv_in": (7.0, 1.0), "mid.conv": (9.0, 0.5)},
            "power": {"mid.conv": (3.0, 0.0), "conv_out": (2.0, 0)},
        },
        tmp_path / "ranks.png",
    )
    axes = saved_figures[0].axes[0]
    assert ticks(axes.yaxis) == ["conv_in", "mid.conv", "conv_out"]
    assert axes.yaxis_inverted()
    assert axes.get_xlim()[0] == 0
    drawn = {bars.get_label(): (bars[0].get_xydata(), bars[2][0].get_segments()) for bars in axes.containers}
    points, spans = drawn["cosine"]
    np.testing.assert_allclose(points, [[7, -0.2], [9, 0.8]])
    np.testing.assert_allclose([span[:, 0] for span in spans], [[6, 8], [8.5, 9.5]])
    np.testing.assert_allclose(drawn["power"][0], [[3, 1.2], [2, 2.2]])
    assert axes.get_xlabel() == "numerical rank of F (mean and standard deviation over classes)"
    (legend,) = saved_figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["cosine", "power"]
    colours = {bars[0].get_color() for bars in axes.containers}
    markers = {bars[0].get_marker() for bars in axes.containers}
    assert len(colours) == len(markers) == 2


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "ranks has 0 groups, expected between 1 and 8"),
        ({str(g): {"a": (1.0, 0.0)} for g in range(9)}, "ranks has 9 groups"),
        ({"cosine": {}}, r"ranks\['cosine'\] is empty"),
        (
            {"cosine": {"a": (-1.0, 0.0)}},
            r"ranks\['cosine'\]\['a'\] is \(-1.0, 0.0\), expected a finite mean of at least 0",
        ),
        ({"cosine": {"a": (1.0, float("nan"))}}, "a standard deviation of at least 0"),
    ],
)
def test_ranks_name_wrong_input(tmp_path, ranks, message):
    with pytest.raises(ValueError, match=message):
        rank_by_layer(ranks, tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layers", "panels", "size"), [(1, 1, 1), (15, 3, 10), (65, 1, 25)])
def test_coefficients_are_a_png(tmp_path, layers, panels, size):
    values = {name: [float(i - 3) for i in range(size)] for name in LAYERS[:layers]}
    coefficients_by_layer({f"quantity {i}": values for i in range(panels)}, tmp_path / "cells.png")
    check(tmp_path / "cells.png")


def test_coefficients_content(tmp_path, saved_figures):
    coefficients_by_layer(
        {
            "alpha": {"up.0.conv": [1.0, -2.0, 0.5], "up.1.conv": [0.0, 1.0, 1.5]},
            "change of omega": {"up.0.conv": [0.0, 0.0, 0.0], "up.1.conv": [0.0, 0.0, 0.0]},
        },
        tmp_path / "cells.png",
        title="cosine, 8 classes",
    )
    figure = saved_figures[0]
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["alpha", "change of omega"]
    assert ticks(first.yaxis) == ["up.0", "up.1"]
    assert ticks(first.xaxis) == ["1", "2", "3"]
    np.testing.assert_array_equal(first.images[0].get_array(), [[1, -2, 0.5], [0, 1, 1.5]])
    # Zero is in the middle of the scale.
    assert first.images[0].get_clim() == (-2, 2)
    assert second.images[0].get_clim() == (-1, 1)
    assert figure.get_supxlabel() == "layers: *.conv"
    assert figure.get_suptitle() == "cosine, 8 classes"


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "panels is empty"),
        ({"alpha": {}}, "quantity of no layer"),
        ({"alpha": {"a": []}}, r"panels\['alpha'\]\['a'\] is \[\], expected some finite numbers"),
        ({"alpha": {"a": [1.0, float("inf")]}}, "expected 2 finite numbers"),
        ({"alpha": {"a": [1.0], "b": [1.0, 2.0]}}, r"panels\['alpha'\]\['b'\] is \[1.0, 2.0\], expected 1 finite"),
        ({"alpha": {"a": [1.0]}, "omega": {"b": [1.0]}}, r"panels\['omega'\] has other layers than the first"),
    ],
)
def test_coefficients_name_wrong_input(tmp_path, panels, message):
    with pytest.raises(ValueError, match=message):
        coefficients_by_layer(panels, tmp_path / "cells.png")
    assert list(tmp_path.iterdir()) == []
