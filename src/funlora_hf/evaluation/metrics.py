"""Compute the scores of class-incremental learning from an accuracy matrix."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any


def continual_scores(accuracy_matrix: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compute the scores of one run.

    Args:
        accuracy_matrix: `R[t][j]`, the accuracy on the test images of task `j` after task `t`; ragged, row `t` has
            `t + 1` entries. Unit: %, range [0, 100].

    Returns:
        "A": a list, mean accuracy over the tasks seen, after each task: `A[t] = mean(R[t][0..t])`; "LA": last accuracy,
        `A[-1]`; "AIA": average incremental accuracy, the mean of `A`. Unit: %, range [0, 100]. "forgetting": see
        `forgetting`.

    Source: arXiv 2510.02631, evaluation protocol: `A`, `LA`, `AIA` [text]. Each task has the same weight, whatever its
        number of test images [text: mean over the tasks]. `forgetting` [ours].
    """
    averages = [fmean(row) for row in accuracy_matrix]
    return {"A": averages, "LA": averages[-1], "AIA": fmean(averages), "forgetting": forgetting(accuracy_matrix)}


def forgetting(accuracy_matrix: Sequence[Sequence[float]]) -> float:
    """Compute the forgetting after the last task: how far each earlier task has fallen from its best accuracy.

    The variant is that of Chaudhry et al. 2018 (arXiv 1801.10112) with one change: the maximum is taken over every
    row, including the last, so that a task that improves counts as 0 and the result is never negative:

        mean over j < T of  max over t <= T of R[t][j]  -  R[T][j]

    Args:
        accuracy_matrix: as for `continual_scores`.

    Returns:
        Percentage points, range [0, 100]; 0 for a single task, since nothing can have been forgotten.

    Source: Chaudhry et al. 2018 [text]; the maximum over all rows is [ours].
    """
    *earlier, last = accuracy_matrix
    drops = [max(row[task] for row in accuracy_matrix[task:]) - last[task] for task in range(len(earlier))]
    return fmean(drops) if drops else 0.0
