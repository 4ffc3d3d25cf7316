"""Check the values of a dataclass, which may come from a file, against its annotations."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection
from typing import Any

from .checks import shortened


# The first integer that torch cannot hold.
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
    """
    Raise a ValueError that names a field, its value and what was expected, unless every value of a dataclass is of its field's type:
    int, float, bool, str or dict, a list of one, or None. Fields in `leave_out` have a check of their own.

    A whole number is valid for a float. No number may be NaN or infinite, or of 64 bits or more; no text may be empty, as a shell
    variable that is not set is, or have a NUL character or half a surrogate pair in it, which neither paths nor files can have.
    """
    for name, hint in typing.get_type_hints(type(arguments)).items():
        value = getattr(arguments, name)
        if name in leave_out or typing.get_origin(hint) is typing.ClassVar:
            continue
        if not _fits(value, hint):
            raise ValueError(f"`{name}` is {shortened(repr(value), 100)}, expected {_words(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each of it {_words(typing.get_args(hint)[0])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
