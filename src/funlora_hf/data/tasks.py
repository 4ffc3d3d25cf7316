"""The split of classes into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .class_ids import check_unique


@dataclass(frozen=True)
class Task:
    """The classes learned together in one step of a continual run; `index` is its place in the run, from 0."""

    index: int
    class_ids: tuple[int, ...]


def split_into_tasks(
    class_ids: Sequence[int],
    classes_per_task: int,
    *,
    class_order_seed: int | None = None,
    first_task: Sequence[int] | None = None,
) -> list[Task]:
    """Split classes into tasks.

    Args:
        class_ids: the dataset's classes, in the dataset's order.
        classes_per_task: classes of each task; the last task may have fewer.
        class_order_seed: None keeps the order of class_ids, a seed shuffles it.
        first_task: classes that an existing generator knows already. If there are any, they are task 0, in
            this order, and the other classes of class_ids follow.

    Returns:
        The tasks; each class is in exactly one.

    Raises:
        ValueError: classes_per_task < 1, an id given twice, or fewer than two classes in all.
    """
    if classes_per_task < 1:
        raise ValueError(
            f"classes_per_task={classes_per_task} must be at least 1: set --classes_per_task to 1 or more."
        )
    class_ids = [int(class_id) for class_id in class_ids]
    known = [int(class_id) for class_id in first_task or ()]
    check_unique("class_ids", class_ids)
    check_unique("first_task", known)
    among_known = set(known)
    new = [class_id for class_id in class_ids if class_id not in among_known]
    if len(known) + len(new) < 2:
        raise ValueError(
            f"class_ids={class_ids} with first_task={known} gives {len(known) + len(new)} class(es), but continual "
            "learning needs at least two classes: choose another dataset (--dataset_name) or another --label_column, "
            "or give --base_model to add this one class to an existing generator."
        )
    if class_order_seed is not None:
        new = [new[index] for index in np.random.default_rng(class_order_seed).permutation(len(new))]
    chunks = [new[start : start + classes_per_task] for start in range(0, len(new), classes_per_task)]
    if known:
        chunks.insert(0, known)
    return [Task(index=index, class_ids=tuple(chunk)) for index, chunk in enumerate(chunks)]
