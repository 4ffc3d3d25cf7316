from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from comparisons import NAMES, made_up_results
from PIL import Image

from comparison.figures import (
    MOST_STRATEGIES,
    Look,
    _apart,
    accuracy_figure,
    cost_figure,
    forgetting_figure,
    samples_figure,
)


def check(path):
    """A PNG, and nothing left beside it; returns its pixels."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def averages(names, tasks=5):
    return {name: [made_up_results(name, seed, tasks=tasks)["A"] for seed in range(3)] for name in names}


def test_every_look_differs_in_grey_too():
    looks = [Look.of(place) for place in range(MOST_STRATEGIES)]
    assert len({(look.marker, look.filled) for look in looks}) == MOST_STRATEGIES
    assert len({(look.colour, look.linestyle) for look in looks}) == MOST_STRATEGIES


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:3], NAMES])
def test_accuracy_has_a_line_a_band_and_a_name_for_each_strategy(tmp_path, saved_figures, names):
    values = averages(names)
    accuracy_figure(values, tmp_path / "figures" / "accuracy.png", classes_seen=[2, 4, 6, 8, 10])
    check(tmp_path / "figures" / "accuracy.png")
    (axes,) = saved_figures[0].axes
    assert sorted(texts(axes)) == sorted(names)
    assert len(axes.collections) == len(names)
    lines = [line for line in axes.lines if len(line.get_xdata()) == 5]
    for line, of_seeds in zip(lines, values.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.mean(of_seeds, axis=0))
    top, bottom = (
        max(values, key=lambda n: np.mean(values[n], 0)[-1]),
        min(values, key=lambda n: np.mean(values[n], 0)[-1]),
    )
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert (places[top], places[bottom]) == (max(places.values()), min(places.values()))


def test_accuracy_is_on_a_fixed_scale_and_names_the_parameters_per_class(tmp_path, saved_figures):
    values = {"funlora": [[99.0, 98.0]], "joint": [[99.5, 99.0]]}
    accuracy_figure(values, tmp_path / "accuracy.png", classes_seen=[1, 2], ppc={"funlora": 1164.0})
    (axes,) = saved_figures[0].axes
    assert axes.get_ylim() == (0, 100)
    assert sorted(texts(axes)) == ["funlora, PPC 1,164", "joint"]


def test_one_seed_has_no_band(tmp_path, saved_figures):
    accuracy_figure({"funlora": [[90.0, 80.0]]}, tmp_path / "accuracy.png", classes_seen=[1, 2])
    assert not saved_figures[0].axes[0].collections


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_names_do_not_overlap_and_stay_in_order(count):
    generator = np.random.default_rng(count)
    for _ in range(50):
        levels = sorted(generator.choice([0.0, 0.01, 0.3, 0.31, 0.99, 1.0, -1.0], count))
        gap = 1 / 14
        places = _apart(levels, gap)
        assert all(later - earlier > gap - 1e-9 for earlier, later in itertools.pairwise(places))
        assert places[0] >= -1e-9
        assert places[-1] <= 1 + 1e-9
    assert _apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert _apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_cost_shows_seconds_and_megabytes(tmp_path, saved_figures):
    seconds = {"funlora": [60.0, 20.0, 20.0], "replay": [60.0, 30.0, 40.0]}
    kept = {"funlora": [2e6, 3e6, 4e6], "replay": [5e6] * 3}
    cost_figure(seconds, kept, tmp_path / "figures" / "cost.png")
    check(tmp_path / "figures" / "cost.png")
    above, below = saved_figures[0].axes
    assert [axes.get_yscale() for axes in (above, below)] == ["linear", "linear"]
    assert [list(line.get_ydata()) for line in above.lines if len(line.get_xdata()) == 3][:2] == list(seconds.values())
    drawn = [list(line.get_ydata()) for line in below.lines if len(line.get_xdata()) == 3]
    assert [2.0, 3.0, 4.0] in drawn
    assert above.get_ylim()[0] == below.get_ylim()[0] == 0


def test_cost_of_very_different_sizes_is_logarithmic_and_leaves_zeros_out(tmp_path, saved_figures):
    cost_figure({"joint": [500.0, 0.0], "funlora": [60.0, 1.0]}, {}, tmp_path / "cost.png")
    (axes,) = saved_figures[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "training of the task (s), log scale"
    joint = axes.lines[0].get_ydata()
    assert joint[0] == 500
    assert np.isnan(joint[1])
    assert sorted(texts(axes)) == ["funlora", "joint"]


def test_a_strategy_looks_the_same_in_both_panels_of_the_cost(tmp_path, saved_figures):
    cost_figure({"a": [1.0], "b": [2.0]}, {"b": [1e6]}, tmp_path / "cost.png")
    above, below = saved_figures[0].axes
    assert above.lines[1].get_color() == below.lines[0].get_color() == Look.of(1).colour


@pytest.mark.parametrize(("names", "tasks"), [(NAMES[:1], 1), (NAMES[:3], 5), (NAMES, 5), (NAMES[:2], 20)])
def test_forgetting_has_a_panel_for_each_strategy_on_one_scale(tmp_path, saved_figures, names, tasks):
    matrices = {name: made_up_results(name, 0, tasks=tasks)["accuracy_matrix"] for name in names}
    forgetting_figure(matrices, tmp_path / "figures" / "forgetting.png")
    check(tmp_path / "figures" / "forgetting.png")
    panels = [axes for axes in saved_figures[0].axes if axes.images and axes.get_title()]
    assert len(panels) == len(names)
    for axes, matrix in zip(panels, matrices.values(), strict=True):
        (image,) = axes.images
        assert image.get_clim() == (0, 100)
        cells = image.get_array()
        for after, row in enumerate(matrix):
            np.testing.assert_allclose(cells[after, : after + 1], row)
            assert np.ma.getmaskarray(cells)[after, after + 1 :].all()
        written = [f"{value:.0f}" for row in matrix for value in row]
        assert texts(axes) == (written if tasks <= 12 else [])


def test_samples_are_shown_pixel_for_pixel(tmp_path, drawn_labels):
    generator = torch.Generator().manual_seed(0)

    def images(count):
        return torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)

    samples = {
        "funlora": [{"zero": images(5), "one": images(5)}, {"zero": images(5), "one": images(5)}],
        "joint": [{"zero": images(2), "one": images(2)}],
    }
    samples_figure(samples, tmp_path / "figures" / "samples.png")
    pixels = check(tmp_path / "figures" / "samples.png")
    # Each image, enlarged four times, is somewhere in the PNG as it is.
    windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (32, 32))
    for per_task in samples.values():
        for by_class in per_task:
            for shown in by_class.values():
                wanted = shown[0, 0].numpy().repeat(4, axis=0).repeat(4, axis=1)
                corners = np.argwhere(windows[:, :, 0, 0] == wanted[0, 0])
                assert any(np.array_equal(windows[tuple(corner)], wanted) for corner in corners)
    title = "Samples of classes zero, one of task 1"
    assert drawn_labels == ["funlora", "joint", "after task 1", "after task 2", title]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (
            lambda path: accuracy_figure({}, path, classes_seen=[1]),
            "averages has 0 strategies, expected between 1 and 14",
        ),
        (
            lambda path: accuracy_figure({str(i): [[1.0]] for i in range(15)}, path, classes_seen=[1]),
            "averages has 15 strategies",
        ),
        (
            lambda path: accuracy_figure({"a": [[1.0, 2.0]]}, path, classes_seen=[1]),
            r"averages\['a'\] has \[2\] entries",
        ),
        (lambda path: forgetting_figure({"a": [[1.0], [1.0]]}, path), r"matrices\['a'\] has rows of \[1, 1\]"),
        (lambda path: cost_figure({"a": []}, {}, path), "'a' has .0. entries, expected 1"),
        (
            lambda path: samples_figure({"a": [{"x": torch.zeros(1, 1, 8, 8)}]}, path),
            r"samples\['a'\] is torch.float32",
        ),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(tmp_path, draw, words):
    with pytest.raises(ValueError, match=words):
        draw(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
