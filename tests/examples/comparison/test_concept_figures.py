from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from comparison.concept_figures import Panel, axes_figure, samples_figure, scores_figure


GROUPS = {"apart": ["lora"], "together": ["joint", "cns"]}
ROWS = ["apart", "lora", "together", "joint", "cns"]


def drawn(axes, row):
    """What is drawn of a strategy: (first x, last x, marker, face) of each line and dot."""
    lines = [line for line in axes.lines if set(line.get_ydata()) == {row}]
    places = [(min(line.get_xdata()), max(line.get_xdata())) for line in lines]
    return [(*place, line.get_marker(), line.get_markerfacecolor()) for place, line in zip(places, lines, strict=True)]


def test_a_strategy_has_a_dot_at_its_mean_and_a_line_over_its_seeds_in_every_panel(tmp_path, saved_figures):
    kept = Panel("kept", "attr", {"lora": [0.8, 1.0], "cns": [0.5]}, {"lora": [0.2, 0.4]}, {"floor": 0.3})
    axes_figure(GROUPS, [kept, Panel("across", "two", {"joint": [0.1, 0.3], "cns": []})], tmp_path / "axes.png")
    first, second = saved_figures[0].axes
    assert [text.get_text() for text in first.get_yticklabels()] == ROWS
    assert [(axes.get_title(), axes.get_xlabel()) for axes in (first, second)] == [("kept", "attr"), ("across", "two")]
    ring, dot = drawn(first, 1)[1::2]
    assert ring[:2] == pytest.approx((0.3, 0.3))
    assert dot[:2] == pytest.approx((0.9, 0.9))
    assert [one[:2] for one in drawn(first, 1)[::2]] == [(0.2, 0.4), (0.8, 1.0)]
    assert ring[2] == dot[2] == "o"
    assert ring[3] == "white" != dot[3]
    assert [one[:2] for one in drawn(first, 4)] == [(0.5, 0.5)] * 2
    # What was not measured has nothing, and a group has one colour.
    assert not drawn(first, 3)
    assert not drawn(second, 4)
    assert drawn(second, 3)[1][3] == drawn(first, 4)[1][3] != dot[3]
    assert [(text.get_text(), text.xy[0]) for text in first.texts] == [("floor", 0.3)]
    assert [0.3, 0.3] in [list(line.get_xdata()) for line in first.lines]


def test_all_panels_have_one_scale_from_0_to_1_and_what_is_beyond(tmp_path, saved_figures):
    axes_figure(GROUPS, [Panel("a", "", {"lora": [0.5]}), Panel("b", "", {"lora": [-0.4]})], tmp_path / "axes.png")
    limits = {axes.get_xlim() for axes in saved_figures[0].axes}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low < -0.4
    assert high > 1
    assert [axes.get_ylim() for axes in saved_figures[0].axes] == [(4.5, -0.5)] * 2


def test_scores_are_numbers_in_cells_below_the_name_of_their_group(tmp_path, saved_figures):
    scores = {"lora": [0.9, 0.8], "joint": [1.0, 0.4], "cns": [0.25]}
    scores_figure(GROUPS, scores, tmp_path / "scores.png", title="attr")
    (axes,) = saved_figures[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ROWS
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert found == {(0, 1): "0.90", (1, 1): "0.80", (0, 3): "1.00", (1, 3): "0.40", (0, 4): "0.25"}
    cells = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_equal(cells, [[np.nan] * 2, [0.9, 0.8], [np.nan] * 2, [1.0, 0.4], [0.25, np.nan]])


def test_samples_have_a_row_a_strategy_of_any_number(tmp_path, drawn_labels):
    samples = {str(n): torch.full((2, 3, 32, 32), n, dtype=torch.uint8) for n in range(30)}
    samples_figure(samples, tmp_path / "samples.png", title="toy1")
    assert drawn_labels == [*samples, "1", "2", "toy1"]
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image)
    assert all((pixels == n).all(axis=-1).sum() >= 2 * 64 * 64 for n in range(30))
