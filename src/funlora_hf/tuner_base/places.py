"""Where a module with adapters is in its model, to find the modules around it."""

from __future__ import annotations

from weakref import ref

from torch import nn


class _Place:
    """The model that a module is in, and its name there. In a copy or a pickle of the module it is None."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model, self.path = ref(model), path

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def remember_place(module: nn.Module, model: nn.Module, path: str) -> None:
    """Let `around` find what is around a module."""
    module.__dict__["_funlora_place"] = _Place(model, path)


def around(module: nn.Module) -> list[nn.Module]:
    """What is on the way to a module, from the innermost to its model, as `remember_place` was told and as it is now."""
    place = module.__dict__.get("_funlora_place")
    if place is None:
        return []
    found = [place.model()]
    for name in place.path.split("."):
        found.append(getattr(found[-1], name, None))  # None if the model has changed since
    return [each for each in reversed(found) if isinstance(each, nn.Module)]
