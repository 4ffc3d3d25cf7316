"""Turns an accuracy matrix into the scores of class-incremental learning."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from statistics import fmean
from typing import Any


def continual_scores(accuracy_matrix: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The scores of one run.

    Args:
        accuracy_matrix: `R[t][j]`, the accuracy on the test images of task `j` after task `t`; ragged, row `t` has
            `t + 1` entries. Unit: %, range [0, 100].

    Returns:
        "A": a list, mean accuracy over the tasks seen, after each task: `A[t] = mean(R[t][0..t])`; "LA": last accuracy,
        `A[-1]`; "AIA": average incremental accuracy, the mean of `A`. Unit: %, range [0, 100]. "forgetting": see
        `forgetting`.

    Raises:
        ValueError: the matrix is empty or not ragged in this way, or an entry is not a finite number in [0, 100].

    Source: arXiv 2510.02631, evaluation protocol: `A`, `LA`, `AIA` [text]. Each task weighs the same, whatever its number
        of test images [text: mean over the tasks]. `forgetting` [ours].
    """
    averages = [fmean(row) for row in _validated(accuracy_matrix)]
    return {"A": averages, "LA": averages[-1], "AIA": fmean(averages), "forgetting": forgetting(accuracy_matrix)}


def forgetting(accuracy_matrix: Sequence[Sequence[float]]) -> float:
    """Forgetting after the last task: how far each earlier task has fallen from its best accuracy.

    The variant is that of Chaudhry et al. 2018 (arXiv 1801.10112) with one change: the maximum is taken over every
    row, the last included, so that a task that improves counts as 0 and the result is never negative:

        mean over j < T of  max over t <= T of R[t][j]  -  R[T][j]

    Args:
        accuracy_matrix: as for `continual_scores`. Unit: %, range [0, 100].

    Returns:
        Percentage points, range [0, 100]; 0 for a single task, since nothing can have been forgotten.

    Raises:
        ValueError: as for `continual_scores`.

    Source: Chaudhry et al. 2018 [text]; the maximum over all rows is [ours].
    """
    matrix = _validated(accuracy_matrix)
    last = matrix[-1]
    drops = [max(row[task] for row in matrix[task:]) - last[task] for task in range(len(matrix) - 1)]
    return fmean(drops) if drops else 0.0


def _validated(accuracy_matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Returns the matrix as lists of floats, or says which entry is wrong."""
    if len(accuracy_matrix) == 0:
        raise ValueError("accuracy_matrix is empty: expected one row per task; evaluate at least one task first")
    matrix = []
    for task, row in enumerate(accuracy_matrix):
        if len(row) != task + 1:
            raise ValueError(
                f"accuracy_matrix[{task}] has {len(row)} entries, expected {task + 1}: row t holds the accuracies on "
                f"tasks 0..t; leave out the tasks that are not yet seen"
            )
        for other, value in enumerate(row):
            # bool is a Real to Python, but never an accuracy; NaN is in no range.
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 100:
                raise ValueError(
                    f"accuracy_matrix[{task}][{other}] is {value!r}, expected a finite number in [0, 100]; accuracies are "
                    "in %"
                )
        matrix.append([float(value) for value in row])
    return matrix
