"""Turns an accuracy matrix into the scores of class-incremental learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean


def average_accuracies(accuracy_matrix: Sequence[Sequence[float]]) -> list[float]:
    """Mean accuracy over the tasks seen, after each task.

    Args:
        accuracy_matrix: `R[t][j]`, the accuracy on the test images of task `j` after task `t`; ragged, row `t` has
            `t + 1` entries. Unit: %, range [0, 100].

    Returns:
        `A[t] = mean(R[t][0..t])`, one number per task. Unit: %, range [0, 100].

    Raises:
        ValueError: the matrix is empty or not ragged in this way, or an entry is not a finite number in [0, 100].

    Source: arXiv 2510.02631, evaluation protocol [text]. Each task weighs the same, whatever its number of test
        images [text: mean over the tasks].
    """
    return [fmean(row) for row in _validated(accuracy_matrix)]


def forgetting(accuracy_matrix: Sequence[Sequence[float]]) -> float:
    """Forgetting after the last task: how far each earlier task has fallen from its best accuracy.

    The variant is that of Chaudhry et al. 2018 (arXiv 1801.10112) with one change: the maximum is taken over every
    row, the last included, so that a task that improves counts as 0 and the result is never negative:

        mean over j < T of  max over t <= T of R[t][j]  -  R[T][j]

    Args:
        accuracy_matrix: as for `average_accuracies`. Unit: %, range [0, 100].

    Returns:
        Percentage points, range [0, 100]; 0 for a single task, since nothing can have been forgotten.

    Raises:
        ValueError: as for `average_accuracies`.

    Source: Chaudhry et al. 2018 [text]; the maximum over all rows is [ours].
    """
    matrix = _validated(accuracy_matrix)
    last = matrix[-1]
    drops = [max(row[task] for row in matrix[task:]) - last[task] for task in range(len(matrix) - 1)]
    return fmean(drops) if drops else 0.0


@dataclass(frozen=True)
class ContinualAccuracy:
    """The scores of one run.

    Attributes:
        A: mean accuracy over the tasks seen, after each task. Unit: %, range [0, 100].
        LA: last accuracy, `A[-1]`. Unit: %, range [0, 100].
        AIA: average incremental accuracy, the mean of `A`. Unit: %, range [0, 100].
        forgetting: see `forgetting`. Unit: percentage points, range [0, 100].

    Source: arXiv 2510.02631, evaluation protocol: `A`, `LA`, `AIA` [text]; `forgetting` [ours].
    """

    A: tuple[float, ...]
    LA: float
    AIA: float
    forgetting: float

    @classmethod
    def from_matrix(cls, matrix: Sequence[Sequence[float]]) -> ContinualAccuracy:
        """Computes every score from the accuracy matrix.

        Args:
            matrix: as for `average_accuracies`. Unit: %, range [0, 100].

        Raises:
            ValueError: as for `average_accuracies`.
        """
        averages = average_accuracies(matrix)
        return cls(A=tuple(averages), LA=averages[-1], AIA=fmean(averages), forgetting=forgetting(matrix))


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
