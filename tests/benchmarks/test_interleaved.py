"""What the benchmarks have in common: turns, ratios, files."""

import importlib.util
import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def interleaved(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("interleaved", BENCHMARKS / "interleaved.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "interleaved", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the functions under test move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(*seconds):
        durations = itertools.cycle(seconds)

        def run():
            now[0] += next(durations)

        return run

    return takes


def test_ratio_is_the_median_over_the_turns(interleaved, clock):
    # The first turn does not count; the last is disturbed.
    slow, fast = clock(100.0, 3.0, 3.0, 3.0, 3.0, 30.0), clock(1.0)
    row = interleaved.compare("slow / fast", {"slow": slow, "fast": fast}, rounds=5, goal="<= 4")
    assert (row.ratio, row.low, row.high) == (3.0, 3.0, 3.0)
    assert row.seconds == {"slow": 3.0, "fast": 1.0}


def test_sides_take_turns_and_begin_in_turns(interleaved):
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    interleaved.compare("turns", sides, rounds=3, calls=2)
    assert "".join(order) == "bbaa" + "aabb" + "bbaa" + "aabb"


def test_a_page_of_all_results(interleaved, clock, tmp_path):
    row = interleaved.compare("one / other", {"one": clock(0.002), "other": clock(2.0)}, rounds=2, goal="<= 1")
    record = {"benchmark": "some", "about": "About it.", **interleaved.environment(), "rows": [asdict(row)]}
    (tmp_path / "some.json").write_text(json.dumps(record))
    page = interleaved.summary(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page
    assert "| one / other | one: 2 ms, other: 2 s | 0.001 (0.001 to 0.001) | <= 1 |" in page
    assert "About it." in page
    assert record["machine"] in page
