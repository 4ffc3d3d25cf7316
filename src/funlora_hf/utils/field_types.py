"""Check the values of a dataclass, which may come from a file, by its annotations."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from .checks import check_at_least_one, check_choice, shortened


@dataclass(frozen=True)
class Range:
    """A check in the `Annotated` type of a field, for `check_field_types`: a number from `low`, or above it, to `high`."""

    low: float
    high: float = math.inf
    above: bool = False
    why: str = ""

    def __call__(self, name: str, value: float) -> None:
        if not self.low <= value <= self.high or (self.above and value == self.low):
            least = f"above {self.low}" if self.above else f"of at least {self.low}"
            most = "" if self.high == math.inf else f", at most {self.high}"
            why = self.why and f": {self.why}"
            raise ValueError(f"`{name}` is {value!r}, expected a number {least}{most}{why}.")


def one_of(*choices: str) -> Callable[[str, object], None]:
    """Return a check for `Annotated`: the text is one of these."""
    return partial(check_choice, choices=choices)


Count = Annotated[int, check_at_least_one]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
LearningRate = Annotated[float, Range(0, 1000, above=True)]

# The first integer that is too large for torch.
_MOST = 2**63
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text that is not empty",
    dict: "a mapping",
    type(None): "None",
}


def check_field_types(arguments: Any, *, leave_out: Collection[str] = ()) -> None:
    """Raise a ValueError unless every value of a dataclass has its field's type and passes the checks of its `Annotated`.

    The error names the field, its value and what was expected. Types are int, float, bool, str, dict, lists of one type, and None.
    Fields in `leave_out` are checked elsewhere. A whole number is valid for a float. A number must be finite and fit into 64 bits.
    A text must not be empty, as from a shell variable that is not set, and must not contain a NUL character or half a surrogate
    pair, which no path or file can contain.
    """
    for name, hint in typing.get_type_hints(type(arguments), include_extras=True).items():
        value = getattr(arguments, name)
        if name in leave_out or typing.get_origin(hint) is typing.ClassVar:
            continue
        if not _fits(value, hint):
            raise ValueError(f"`{name}` is {shortened(repr(value), 100)}, expected {_words(hint)}.")
        for check in [check for one in (hint, *typing.get_args(hint)) for check in getattr(one, "__metadata__", ())]:
            if value is not None:
                check(name, value)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return _fits(value, typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, typing.get_args(hint)[0]) for entry in value)
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and abs(value) < _MOST and math.isfinite(value)
    if hint is str:
        valid = isinstance(value, str) and value and "\0" not in value
        return bool(valid) and not any("\ud800" <= one <= "\udfff" for one in value)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return _words(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each entry {_words(typing.get_args(hint)[0])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
