"""Remember where a module with adapters is in its model, to find the modules around it."""

from __future__ import annotations

from weakref import ref

from torch import nn


class _Place:
    """The model that contains a module, and the module's name there. A copy or a pickle of the module has None instead."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model, self.path = ref(model), path

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def remember_place(module: nn.Module, model: nn.Module, path: str) -> None:
    """Store a module's place in a model, for `around`."""
    module.__dict__["_funlora_place"] = _Place(model, path)


def around(module: nn.Module) -> list[nn.Module]:
    """Return the modules that now contain a module, innermost first, up to its model, at the place of `remember_place`."""
    place = module.__dict__.get("_funlora_place")
    if place is None:
        return []
    found = [place.model()]
    for name in place.path.split("."):
        found.append(getattr(found[-1], name, None))  # None if the model has changed since
    return [each for each in reversed(found) if isinstance(each, nn.Module)]
