"""Figures: that they are PNG files, whole, with the right content and no trace beside them."""

import itertools
import math
import sys

import matplotlib.figure
import numpy as np
import pytest
import torch
from pictures import LAYERS, check, pixels, ticks
from PIL import Image

from funlora_hf.evaluation.figures import (
    accuracy_curve,
    drift_curves,
    image_grid,
    layer_importance,
    loss_curves,
    sample_grid,
)


def images(count, *, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64), (1, 100)])
@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_an_image_grid_has_columns_of_whole_pixels(tmp_path, count, channels, size):
    path, shown = tmp_path / "figures" / "class_0.png", images(count, channels=channels, size=size)
    image_grid(shown, path, columns=4)
    found = check(path)
    factor = {8: 8, 32: 2, 64: 1, 100: 1}[size]
    cell = factor * size + 2
    rows, columns = {1: (1, 1), 3: (1, 3), 5: (2, 4), 16: (4, 4)}[count]
    assert found.shape == (rows * cell, columns * cell, 3)
    for place in range(rows * columns):
        top, left = place // columns * cell, place % columns * cell
        tile = found[top : top + cell, left : left + cell]
        edge = np.ones((cell, cell), dtype=bool)
        edge[1:-1, 1:-1] = False
        assert (tile[edge] == 255).all()
        if place < count:
            expected = np.broadcast_to(shown[place].permute(1, 2, 0).numpy(), (size, size, 3))
            np.testing.assert_array_equal(tile[1:-1, 1:-1], expected.repeat(factor, axis=0).repeat(factor, axis=1))
        else:
            assert (tile == 255).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda shown, path: image_grid(shown, path, columns=4),
        lambda shown, path: sample_grid({"a": shown}, path, title="b"),
    ],
    ids=["class", "sample"],
)
def test_equal_images_make_an_equal_grid_without_matplotlib(tmp_path, monkeypatch, draw):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    contents = []
    for seed in (0, 0, 1):
        draw(images(6, seed=seed), tmp_path / "grid.png")
        contents.append((tmp_path / "grid.png").read_bytes())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (images(2).float(), r"images is torch.float32 \(2, 3, 8, 8\), expected uint8"),
        (images(2)[0], r"images is torch.uint8 \(3, 8, 8\), expected uint8"),
        (images(0), r"images is torch.uint8 \(0, 3, 8, 8\), expected"),
        (images(2, channels=2), r"images is torch.uint8 \(2, 2, 8, 8\), expected"),
    ],
)
def test_an_image_grid_names_bad_images(tmp_path, given, text):
    with pytest.raises(ValueError, match=text):
        image_grid(given, tmp_path / "grid.png", columns=4)
    assert not list(tmp_path.iterdir())


def test_an_image_grid_has_a_name_for_each_row(tmp_path, drawn_labels):
    """Each name is black on white, level with its row; the images are where they are without names."""
    shown = images(4, seed=1)
    image_grid(shown, tmp_path / "plain.png", columns=2)
    image_grid(shown, tmp_path / "named.png", columns=2, names=["3 (three)", "a\nb"])
    assert drawn_labels == ["", "3 (three)", "a b", ""]
    plain, named = pixels(tmp_path / "plain.png"), pixels(tmp_path / "named.png")
    assert plain.shape == (132, 132, 3)
    np.testing.assert_array_equal(named[:, -131:], plain[:, 1:])
    labels = named[:, :-131]
    assert (labels.max(axis=2) == labels.min(axis=2)).all()
    rows = np.argwhere(labels[..., 0] < 128)[:, 0]
    assert set(rows // 66) == {0, 1}
    for row in range(2):
        middle = rows[rows // 66 == row].mean() - 66 * row
        assert 25 < middle < 41


@pytest.mark.parametrize(("classes", "channels"), [(1, 1), (2, 3), (10, 1), (100, 3)])
def test_grid_is_a_png(tmp_path, classes, channels):
    path = tmp_path / "figures" / "grid.png"
    sample_grid({f"class {c}": images(3, channels=channels, seed=c) for c in range(classes)}, path, title="")
    found = check(path)
    side = 64 if classes <= 20 else 32
    assert found.shape[0] >= classes * side
    assert found.shape[1] >= 3 * side


def test_grid_shows_every_pixel_as_a_square(tmp_path):
    # One image whose 16 pixels all differ, none grey, so that no text or border has their colours.
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, 0] = torch.arange(16).reshape(4, 4) * 16
    image[0, 2] = 255 - torch.arange(16).reshape(4, 4)
    sample_grid({"a": image}, tmp_path / "grid.png", title="")
    found = check(tmp_path / "grid.png")
    for row in range(4):
        for column in range(4):
            colour = image[0, :, row, column].numpy()
            where = np.argwhere((found == colour).all(axis=2))
            # An image of 64 pixels: each of the 16 is enlarged to 16 x 16, unsmoothed.
            assert len(where) == 256
            assert (where.max(axis=0) - where.min(axis=0) == 15).all()


def test_grid_rows_follow_the_mapping_and_columns_the_limit(tmp_path, drawn_labels):
    red = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 250
    blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    blue[:, 2] = 250
    sample_grid({"zebra": red, "ant": blue}, tmp_path / "grid.png", title="after task 1")
    found = check(tmp_path / "grid.png")
    is_red = (found == (250, 0, 0)).all(axis=2)
    is_blue = (found == (0, 0, 250)).all(axis=2)
    assert is_red.sum() == 10 * 64 * 64
    assert is_blue.sum() == 2 * 64 * 64
    assert np.argwhere(is_red)[:, 0].max() < np.argwhere(is_blue)[:, 0].min()
    assert drawn_labels == ["zebra", "ant", "after task 1"]


def test_grid_shortens_long_names_in_the_middle(tmp_path, drawn_labels):
    sample_grid({"first" + "x" * 60 + "last": images(1)}, tmp_path / "grid.png", title="")
    name, _ = drawn_labels
    assert len(name) <= 40
    assert name.startswith("first")
    assert name.endswith("last")
    assert "…" in name


def test_a_grid_is_a_png_only(tmp_path):
    with pytest.raises(ValueError, match=r"path is 'grid.jpg', expected a name ending in .png"):
        image_grid(images(1), "grid.jpg", columns=1)


@pytest.mark.parametrize("tasks", [1, 2, 50])
@pytest.mark.parametrize("with_joint", [False, True])
def test_curve_is_a_png(tmp_path, tasks, with_joint):
    values = [95 - task for task in range(tasks)]
    accuracy_curve(
        values,
        tmp_path / "curve.png",
        classes_seen=[2 * (task + 1) for task in range(tasks)],
        label="a",
        joint=[value + 3 for value in values] if with_joint else None,
    )
    check(tmp_path / "curve.png")


def test_curve_content(tmp_path, saved_figures):
    accuracy_curve(
        [90.0, 70.0, 60.0],
        tmp_path / "curve.png",
        classes_seen=[20, 40, 60],
        joint=[91.0, 80.0, 75.0],
        label="generative replay",
    )
    axes = saved_figures[0].axes[0]
    assert axes.get_xlabel() == "classes seen"
    assert axes.get_ylabel() == "average accuracy (%)"
    assert axes.get_ylim() == (0, 100)
    assert ticks(axes.xaxis) == ["20", "40", "60"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["generative replay"].get_xydata().tolist() == [[20, 90], [40, 70], [60, 60]]
    assert lines["joint (upper bound)"].get_xydata().tolist() == [[20, 91], [40, 80], [60, 75]]
    assert lines["joint (upper bound)"].get_linestyle() == "--"
    assert lines["generative replay"].get_linestyle() == "-"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(lines)


@pytest.mark.parametrize(
    ("values", "bottom"), [([99.0, 80.0], 0), ([99.0, 80.1], 75), ([99.0, 96.0], 95), ([100.0], 95), ([95.2], 90)]
)
def test_curve_says_where_its_axis_starts(tmp_path, saved_figures, values, bottom):
    accuracy_curve(values, tmp_path / "curve.png", classes_seen=range(1, len(values) + 1), label="a")
    axes = saved_figures[0].axes[0]
    assert axes.get_ylim() == (bottom, 100)
    assert axes.get_yticks()[0] == bottom
    assert (f"from {bottom}" in axes.get_ylabel()) == (bottom > 0)


def test_curve_reaches_the_last_class_with_many_tasks(tmp_path, saved_figures):
    accuracy_curve([50.0] * 50, tmp_path / "curve.png", classes_seen=range(2, 101, 2), label="a")
    shown = ticks(saved_figures[0].axes[0].xaxis)
    assert "100" in shown
    assert len(shown) <= 12


def test_drift_has_a_line_for_the_classes_of_each_task(tmp_path, saved_figures):
    """A task that was not measured, and a class without a measure, leave gaps."""

    def row(*values):
        return {
            c: {"mean": value, "covariance": value and 2 * value, "accuracy": 90.0}
            for c, value in zip("513", values, strict=False)
        }

    drift_curves(
        [row(0.25, 0.75), None, row(0.5, None, 1.5)], row(0.125, 0.125), tmp_path / "drift.png", tasks=[(5, 1), (3,)]
    )
    check(tmp_path / "drift.png")
    for axes, factor, name in zip(saved_figures[0].axes, (1, 2), ("means", "covariances"), strict=False):
        assert name in axes.get_ylabel()
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert lines["real images"] == [0.125 * factor] * 2
        assert np.array_equal(lines["task 1"], [0.5 * factor, math.nan, 0.5 * factor], equal_nan=True)
        assert np.array_equal(lines["task 2"], [math.nan, math.nan, 1.5 * factor], equal_nan=True)
    (legend,) = saved_figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["real images", "task 1", "task 2"]


@pytest.mark.parametrize("count", [1, 15, 70])
def test_importance_is_a_png(tmp_path, saved_figures, count):
    layer_importance({name: (0.1 + i / 100, 0.02) for i, name in enumerate(LAYERS[:count])}, tmp_path / "bars.png")
    check(tmp_path / "bars.png")
    axes = saved_figures[0].axes[0]
    assert len(ticks(axes.yaxis)) == len(set(ticks(axes.yaxis))) == count
    # Labels must not run into each other.
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


def test_importance_content(tmp_path, saved_figures):
    layer_importance({"conv_in": (0.1, 0.01), "mid.conv": (0.4, 0.05), "conv_out": (0.2, 0.0)}, tmp_path / "bars.png")
    axes = saved_figures[0].axes[0]
    assert ticks(axes.yaxis) == ["conv_in", "mid.conv", "conv_out"]
    assert [bar.get_width() for bar in axes.patches] == [0.1, 0.4, 0.2]
    # The first layer is on top.
    assert axes.yaxis_inverted()
    (errors,) = axes.collections
    spans = [segment[:, 0].tolist() for segment in errors.get_segments()]
    np.testing.assert_allclose(spans, [[0.09, 0.11], [0.35, 0.45], [0.2, 0.2]])
    assert axes.get_xlabel() == "importance (mean and standard deviation over classes)"


@pytest.mark.parametrize(
    ("names", "shown", "shared"),
    [
        (["unet.mid.conv1.weight", "unet.mid.conv2.weight"], ["conv1", "conv2"], "unet.mid.*.weight"),
        (["unet.up.0.conv", "unet.up.1.conv"], ["up.0", "up.1"], "unet.*.conv"),
        (["unet.up.0.a.conv", "unet.up.0.b.conv"], ["a", "b"], "unet.up.0.*.conv"),
        (["a.conv", "a.conv.b"], ["conv", "conv.b"], "a.*"),
        (["conv_in", "conv_out"], ["conv_in", "conv_out"], None),
        (["down.0.conv"], ["down.0.conv"], None),
    ],
)
def test_importance_writes_shared_parts_of_names_once(tmp_path, saved_figures, names, shown, shared):
    layer_importance(dict.fromkeys(names, (1.0, 0.1)), tmp_path / "bars.png")
    axes = saved_figures[0].axes[0]
    assert ticks(axes.yaxis) == shown
    assert axes.get_xlabel().partition("\nlayers: ")[2] == (shared or "")


DRAWINGS = {
    "accuracy_curve": lambda path: accuracy_curve([50.0], path, classes_seen=[2], label="a"),
    "layer_importance": lambda path: layer_importance({"a": (1.0, 0.1)}, path),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "funlora-hf\[demo\]"'):
        draw(tmp_path / "figure.png")


def test_a_failed_write_keeps_the_old_grid(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    sample_grid({"a": images(1)}, path, title="")
    before = path.read_bytes()

    def fail(self, target, **kwargs):
        target.write_bytes(b"half a figure")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        sample_grid({"a": images(1)}, path, title="")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_a_failed_write_keeps_the_old_figure(tmp_path, monkeypatch, draw):
    path = tmp_path / "figure.png"
    draw(path)
    before = path.read_bytes()

    def fail(self, target, **kwargs):
        target.write_bytes(b"half a figure")
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_style_and_pyplot_are_left_alone(tmp_path, draw):
    before = dict(matplotlib.rcParams)
    draw(tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_each_phase_has_a_curve_of_its_losses(saved_figures, tmp_path):
    loss_curves({"base": [1.0, 0.5], "class_2": [0.4, None, 0.2, 0.1]}, tmp_path / "loss.png")
    (axes,) = saved_figures[0].axes
    base, class_2 = axes.lines
    assert list(base.get_xdata()) == [25, 75]
    assert list(class_2.get_xdata()) == [12.5, 37.5, 62.5, 87.5]
    np.testing.assert_array_equal(class_2.get_ydata(), [0.4, np.nan, 0.2, 0.1])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "class_2"]
    loss_curves({f"class_{label}": [1.0] for label in range(11)}, tmp_path / "loss.png")
    assert saved_figures[1].axes[0].get_legend() is None
