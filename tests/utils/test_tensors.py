"""What does not fit, in words: names, shapes, values."""

import pytest
import torch

from funlora_hf.utils.checks import listed
from funlora_hf.utils.tensors import check_before_loading, misnamed, misshapen, not_finite


LIVE = {"a.A.x": torch.zeros(2, 1), "a.B.x": torch.zeros(3), "b.A.y": torch.zeros(4)}


def test_misnamed_tells_missing_from_unexpected():
    problems = misnamed(LIVE, {"a.A.x": torch.zeros(5), "c.A.x": torch.zeros(6)})
    assert sorted(problems) == [
        "a.B.x: missing, expected a tensor of shape (3,)",
        "b.A.y: missing, expected a tensor of shape (4,)",
        "c.A.x: found a tensor of shape (6,), expected none",
    ]


def test_misshapen_compares_what_both_have():
    assert misshapen(LIVE, {"a.A.x": torch.zeros(1, 2), "a.B.x": torch.zeros(3), "c.A.x": torch.zeros(6)}) == [
        "a.A.x: found shape (1, 2), expected (2, 1)"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(value, dtype):
    spoiled = torch.tensor([1.0, value], dtype=dtype)
    assert not_finite({"a": torch.ones(2, dtype=dtype), "b": spoiled, "c": torch.ones(2, dtype=torch.int64)}) == [
        "b: found NaN or infinity, expected finite values"
    ]


def test_tensors_without_values_are_not_looked_at():
    assert not_finite({"a": torch.empty(3, device="meta")}) == []


def test_listed_is_sorted_and_short():
    assert listed(["b", "a", "b"]) == "- a\n- b"
    lines = listed(f"{number:02}" for number in range(30)).splitlines()
    assert lines == [f"- {number:02}" for number in range(10)] + ["- and 20 more"]


def test_only_adapters_that_are_loaded_have_to_be_whole():
    x = {key: value for key, value in LIVE.items() if key.endswith(".x")}
    check_before_loading(LIVE, {}, saved_modules={})
    check_before_loading(LIVE, x, saved_modules={})
    check_before_loading(LIVE, LIVE, saved_modules={"whole": torch.ones(1)})
    for tensors, saved_modules, said in (
        ({"a.A.x": LIVE["a.A.x"]}, {}, r"a\.B\.x: missing"),
        ({**x, "z.A.x": torch.zeros(1)}, {}, r"z\.A\.x: found"),
        ({"z.A": torch.zeros(1)}, {}, r"z\.A: found"),
        ({**x, "a.B.x": torch.full((3,), float("nan"))}, {}, r"a\.B\.x: found NaN"),
        ({}, {"whole": torch.full((1,), float("inf"))}, "whole: found NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)do not fit.*{said}"):
            check_before_loading(LIVE, tensors, saved_modules=saved_modules)
