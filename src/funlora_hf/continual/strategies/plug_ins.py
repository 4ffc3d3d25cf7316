"""Strategies that other installed packages bring, by an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ...utils.checks import check_choice
from ..learning import LearningStrategy


GROUP = "funlora_hf.strategies"

Kind = TypeVar("Kind", bound=LearningStrategy)


def find_strategy(name: str, own: Mapping[str, type[Kind]], kind: type) -> type[Kind]:
    """Return the strategy of a name: one of the package's own, or of an entry point of the group `funlora_hf.strategies`.

    Only the entry point of this name is imported.

    Args:
        own: the package's strategies by name.
        kind: class of which the strategy has to be.

    Raises:
        ValueError: an unknown name, two strategies of this name, or an entry point that is no strategy of this kind.
    """
    points = entry_points(group=GROUP)
    check_choice("strategy", name, tuple(dict.fromkeys((*own, *sorted(points.names)))))
    found = list(points.select(name=name))
    if len(found) + (name in own) > 1:
        raise ValueError(
            f"`strategy` {name!r} is brought by {', '.join(map(_package, found))}, but there is another one of this name: uninstall one."
        )
    return _loaded(found[0], kind) if found else own[name]


def _loaded(point: EntryPoint, kind: Any) -> Any:
    shown = f"`strategy` {point.name!r} of the package {_package(point)}"
    try:
        loaded = point.load()
    except Exception as error:  # whatever the module raises
        raise ValueError(
            f"{shown} cannot be imported ({type(error).__name__}: {error}): repair or uninstall it."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, kind)):
        raise ValueError(f"{shown} is {point.value}, expected a subclass of {kind.__name__} here.")
    if (own := getattr(loaded, "name", None)) != point.name:
        raise ValueError(f"{shown} has the `name` {own!r}, expected that of its entry point.")
    return loaded


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "?"
