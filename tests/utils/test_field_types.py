"""Checks that a field's type carries: ranges and choices, also of fields that may be None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from funlora_hf.utils.field_types import Count, Natural, Positive, Range, Share, check_field_types, one_of


@dataclass
class Settings:
    count: Count | None = None
    natural: Natural = 0
    positive: Positive = 0.5
    share: Share = 1
    scale: Annotated[float, Range(0, 10, above=True, why="ten is enough")] = 10
    kind: Annotated[str, one_of("a", "b")] = "a"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"count": 1},
        {"natural": 7},
        {"positive": 1e-9},
        {"share": 0},
        {"share": 0.3},
        {"scale": 0.1},
        {"kind": "b"},
    ],
)
def test_values_in_their_range_pass(given):
    check_field_types(Settings(**given))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"count": 0}, "`count` should be a positive integer value but the value passed is 0"),
        ({"count": 1.5}, "`count` is 1.5, expected a whole number or None"),
        ({"natural": -1}, "`natural` is -1, expected a number of at least 0"),
        ({"natural": None}, "`natural` is None, expected a whole number"),
        ({"positive": 0}, "`positive` is 0, expected a number above 0"),
        ({"share": 1.1}, "`share` is 1.1, expected a number of at least 0, at most 1"),
        ({"share": -0.1}, "`share` is -0.1, expected a number of at least 0, at most 1"),
        ({"share": float("nan")}, "`share` is nan, expected a number"),
        ({"scale": 0}, "`scale` is 0, expected a number above 0, at most 10: ten is enough"),
        ({"kind": "c"}, "`kind` is 'c', expected one of: 'a', 'b'"),
    ],
)
def test_values_out_of_their_range_are_named(given, text):
    with pytest.raises(ValueError, match=text):
        check_field_types(Settings(**given))
