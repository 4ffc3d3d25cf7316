"""The ids of new classes beside those that a generator knows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ..utils.checks import one_form, shortened


def assign_class_ids(names: Sequence[str], known: Mapping[int, str], *, taken: Collection[int] = ()) -> list[int]:
    """Ids for a dataset's classes next to the classes that a generator knows.

    Args:
        names: the dataset's class names, in its order.
        known: class id -> name of the generator's classes; may be empty.
        taken: further ids that no new class may get.

    Returns:
        One id for each name: the known one if the name is known, in whatever Unicode form, else the next free id above those
        known and taken.

    Raises:
        ValueError: a name given twice, in names or in known.
    """
    names = [one_form(name) for name in names]
    id_of = {one_form(name): class_id for class_id, name in known.items()}
    check_unique("names", names)
    check_unique("known", [one_form(name) for name in known.values()])
    free = itertools.count(max([*known, *taken], default=-1) + 1)
    return [id_of[name] if name in id_of else next(free) for name in names]


def check_unique(field: str, values: list) -> None:
    """Raise a ValueError that names the field and what it holds more than once."""
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    if repeated:
        raise ValueError(
            f"{field}={shortened(str(values), 1000)} holds {shortened(str(repeated), 1000)} more than once: each class must be "
            "given once."
        )
