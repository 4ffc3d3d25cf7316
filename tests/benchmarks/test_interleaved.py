"""What the benchmarks have in common: turns, ratios, files."""

import itertools
import json
import sys
import time
from dataclasses import asdict

import pytest


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


def test_more_than_two_sides_take_turns(interleaved, clock):
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    assert {side: len(values) for side, values in interleaved.take_turns("turns", sides, rounds=2).items()} == {
        "a": 2,
        "b": 2,
        "c": 2,
    }
    assert "".join(order) == "cba" + "abc" + "cba"


def test_rows_from_seconds_compare_round_by_round(interleaved):
    row = interleaved.comparison("one / two", {"one": [4.0, 9.0, 20.0], "two": [2.0, 3.0, 5.0]})
    assert (row.low, row.ratio, row.high) == (2.5, 3.0, 3.5)
    assert row.seconds == {"one": 9.0, "two": 3.0}


def test_a_point_has_median_and_quartiles(interleaved):
    assert asdict(interleaved.point(10, [5.0, 1.0, 3.0, 2.0, 4.0])) == {
        "classes": 10,
        "value": 3.0,
        "low": 2.0,
        "high": 4.0,
    }


def test_a_script_writes_what_it_found_and_the_page_shows_it(interleaved, monkeypatch, tmp_path, capsys):
    curve = interleaved.Curve(
        "size", "kB", [interleaved.Point(1, 2.5, 2.5, 2.5), interleaved.Point(1000, 2500, 2500, 2500)]
    )
    short = interleaved.Curve("time", "ms", [interleaved.Point(1, 0.25, 0.2, 0.3)])
    findings = interleaved.Findings(
        skipped=[interleaved.Skipped("a rival", "no module")], curves=[curve, short], facts={"files are equal": True}
    )
    monkeypatch.setattr(sys, "argv", ["growth.py", "--output_dir", str(tmp_path), "--num_threads", "1"])
    path = interleaved.main("About it.\n\nMore.", lambda: findings, "somewhere/growth.py")
    assert path == tmp_path / "growth.json"
    record = json.loads(path.read_text())
    assert record["skipped"] == [{"name": "a rival", "reason": "no module"}]
    assert (record["rows"], record["about"], record["threads"]) == ([], "About it.", 1)
    assert "Skipped: a rival: no module" in capsys.readouterr().err
    page = interleaved.summary(tmp_path)
    assert "| what | 1 | 1,000 |\n|---|---|---|\n| size (kB) | 2.5 | 2,500 |\n| time (ms) | 0.25 |  |" in page
    assert "Skipped: a rival: no module" in page
    assert "files are equal: True" in page
