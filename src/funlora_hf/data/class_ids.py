"""Ids for new classes, next to the classes that a generator knows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ..utils.checks import did_you_mean, one_form, shortened


def assign_class_ids(names: Sequence[str], known: Mapping[int, str], *, taken: Collection[int] = ()) -> list[int]:
    """Assign ids to a dataset's classes, next to the classes that a generator knows.

    Args:
        names: the dataset's class names, in its order.
        known: class id -> name of the generator's classes; may be empty.
        taken: further ids that no new class may get.

    Returns:
        One id for each name: the known id if the name is known, in any Unicode form, else the next id above all known and
        taken ones.

    Raises:
        ValueError: a name given twice, in names or in known.
    """
    names = [one_form(name) for name in names]
    id_of = {one_form(name): class_id for class_id, name in known.items()}
    check_unique("names", names)
    check_unique("known", [one_form(name) for name in known.values()])
    free = itertools.count(max([*known, *taken], default=-1) + 1)
    return [id_of[name] if name in id_of else next(free) for name in names]


def ordered_class_ids(order: Sequence[str], classes: Mapping[int, str]) -> list[int]:
    """Return the ids of classes in an order that is given as text.

    Args:
        order: each class once, by its id or its name. A text that is both an id and a name counts as the id.
        classes: id -> name.

    Raises:
        ValueError: a text that is no class, or a class that is missing or given twice.
    """
    known = {one_form(name): class_id for class_id, name in classes.items()}
    known |= {str(class_id): class_id for class_id in classes}
    for text in order:
        if one_form(text) not in known:
            raise ValueError(
                f"`class_order` has {text!r}, which is not a class of the dataset.{did_you_mean(text, known)}"
            )
    ids = [known[one_form(text)] for text in order]
    check_unique("class_order", ids)
    if missing := [name for class_id, name in classes.items() if class_id not in ids]:
        named = shortened(", ".join(map(repr, missing)), 1000)
        raise ValueError(
            f"`class_order` leaves out {named}: give each class once, and --num_tasks to stop before the last."
        )
    return ids


def check_unique(field: str, values: list) -> None:
    """Raise a ValueError that names the field and its repeated values."""
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    if repeated:
        raise ValueError(
            f"{field}={shortened(str(values), 1000)} holds {shortened(str(repeated), 1000)} more than once: each class must be "
            "given once."
        )
