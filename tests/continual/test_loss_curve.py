from __future__ import annotations

import math

import pytest

from funlora_hf.continual.loss_curve import LossCurve


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (7, 7), (50, 50), (120, 50)])
def test_a_curve_has_the_means_of_equal_parts(steps, points):
    curve = LossCurve(steps)
    for step in range(steps):
        curve.add(step, float(step))
    means = curve.means()
    assert len(means) == points
    assert means == sorted(means)
    # Parts of 120 / 50 steps: steps 0 to 2, 3 and 4, ...
    assert means[:2] == ([1.0, 3.5] if steps == 120 else [0.0, 1.0][:points])


def test_a_curve_goes_on_where_it_was_and_leaves_out_what_is_not_finite():
    whole, first, second = LossCurve(4), LossCurve(4), LossCurve(4)
    for step, loss in enumerate((0.1, math.nan, 0.3, math.inf)):
        whole.add(step, loss)
        (first if step < 2 else second).add(step, loss)
        if step == 1:
            second.load(first.state())
    assert second.means() == whole.means() == [0.1, None, 0.3, None]
