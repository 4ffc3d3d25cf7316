"""The mean of several runs, as text."""

from __future__ import annotations

from results import QUALITY, results
from summarize_runs import mean_table


def test_the_mean_is_over_the_runs():
    text = mean_table([results(0, 97.0), results(1, 99.0)])
    assert "seeds 0, 1" in text
    assert "LA (%)               98.00 +- 1.41" in text


def test_image_quality_has_a_mean_where_all_runs_measured_it_alike():
    def run(seed, **changes):
        return {**results(seed, 98.0), "image_quality": {**QUALITY, **changes}}

    text = mean_table([run(0), run(1, frechet_distance=7.408, recall=0.6)])
    assert "Frechet distance      6.41 +- 1.41" in text
    assert "recall               0.700 +- 0.141" in text
    for other in (results(1, 98.0), run(1, extractor="inception"), run(1, num_real=100), run(1, neighbours=3)):
        assert "recall" not in mean_table([run(0), other])


def test_what_was_not_measured_has_no_mean():
    unmeasured = {**results(0, 98.0), **dict.fromkeys(("A", "LA", "AIA", "forgetting"))}
    assert "LA (%)" not in mean_table([unmeasured, unmeasured])


def test_outside_data_has_no_held_out_loss():
    outside = {**results(0, 98.0), "outside_data": True, "held_out_loss": {"mean": None, "per_class": {}}}
    text = mean_table([outside, outside])
    assert text.startswith("funlora (outside data) on digits")
    assert "held-out loss            -" in text
