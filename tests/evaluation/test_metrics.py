"""Scores of an accuracy matrix against hand-worked values, numpy and properties."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from funlora_hf.evaluation.metrics import continual_scores, forgetting


HAND_WORKED = [
    [90.0],
    [80.0, 70.0],
    [85.0, 40.0, 100.0],
]

accuracies = st.floats(0, 100, allow_nan=False)


@st.composite
def matrices(draw):
    tasks = draw(st.integers(1, 8))
    return [draw(st.lists(accuracies, min_size=t + 1, max_size=t + 1)) for t in range(tasks)]


def test_hand_worked_matrix():
    # Forgetting, task 0: 90 - 85 = 5; task 1: 70 - 40 = 30.
    assert continual_scores(HAND_WORKED) == {"A": [90.0, 75.0, 75.0], "LA": 75.0, "AIA": 80.0, "forgetting": 17.5}


def test_a_task_that_improves_is_not_negative_forgetting():
    # The variant without the last row in the maximum would give 50 - 60 = -10.
    assert forgetting([[50.0], [60.0, 70.0]]) == 0.0


def test_the_best_accuracy_may_lie_between_the_first_and_the_last():
    assert forgetting([[50.0], [80.0, 0.0], [60.0, 0.0, 0.0]]) == 10.0


def test_one_task_forgets_nothing():
    assert continual_scores([[42.0]]) == {"A": [42.0], "LA": 42.0, "AIA": 42.0, "forgetting": 0.0}


@given(matrices())
def test_against_numpy(matrix):
    full = np.full((len(matrix), len(matrix)), np.nan)
    for task, row in enumerate(matrix):
        full[task, : task + 1] = row
    result = continual_scores(matrix)
    np.testing.assert_allclose(result["A"], np.nanmean(full, axis=1), atol=1e-9)
    np.testing.assert_allclose(result["AIA"], np.nanmean(full, axis=1).mean(), atol=1e-9)
    expected = (np.nanmax(full, axis=0) - full[-1])[:-1].mean() if len(matrix) > 1 else 0.0
    np.testing.assert_allclose(result["forgetting"], expected, atol=1e-9)


@given(matrices())
def test_properties(matrix):
    result = continual_scores(matrix)
    assert len(result["A"]) == len(matrix)
    assert result["A"][-1] == result["LA"]
    assert 0 <= result["forgetting"] <= 100
    assert min(result["A"]) - 1e-9 <= result["AIA"] <= max(result["A"]) + 1e-9


@given(matrices(), accuracies)
def test_forgetting_ignores_the_newest_task(matrix, other):
    changed = [*matrix[:-1], [*matrix[-1][:-1], other]]
    assert forgetting(changed) == forgetting(matrix)
