from __future__ import annotations

import csv
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from runs import digests

from funlora_hf.utils.files import read_json


SHORT = {
    "max_images_per_class": 8,
    "classes_per_task": 5,
    "max_train_steps": 2,
    "num_samples_per_class": 4,
    "num_probe_samples": 1,
}
STRATEGIES = ("--strategies", "frozen", "joint:base_train_steps=1,label=upper bound", "--seeds", "0", "1")


@pytest.fixture
def compare(run_short_example):
    return partial(run_short_example, "compare_strategies.py", SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def finished(compare, folder):
    """The output of a finished comparison, run once."""
    if not (folder / "out" / "report.html").is_file():
        done = compare(folder, *STRATEGIES, "--num_workers", "2")
        assert re.search(r"^upper bound +2 ", done.stdout, flags=re.MULTILINE)
        assert "runs, 4 of 4: " in done.stderr
    return folder / "out"


def rows(out: Path) -> dict[str, dict[str, str]]:
    return {row["strategy"]: row for row in csv.DictReader((out / "comparison.csv").open(encoding="utf-8"))}


def test_bad_arguments_end_in_one_line_before_anything_is_written(compare, tmp_path):
    done = compare(tmp_path, "--strategies", "frozen", "joint:seed=3", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: `strategies` has 'joint:seed=3' with 'seed', expected")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_is_written_and_names_what_failed(compare, tmp_path):
    done = compare(tmp_path, *STRATEGIES, check=False, dataset_name="nowhere/at/all")
    assert done.returncode == 1
    assert "error: failed runs: frozen (seed 0), frozen (seed 1), upper bound (seed 0)" in done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Failed runs: 4." in page
    assert "upper bound, seed 1: " in page
    assert "frozen, seed 0: <code>its base failed: " in page
    # frozen has not begun; its base's log tells why.
    for pattern in ("seed_0/joint_*", "bases/seed_0_*"):
        (log,) = (tmp_path / "out").glob(f"{pattern}/log.txt")
        assert "Traceback" in log.read_text()


@pytest.mark.slow
def test_every_strategy_and_seed_is_in_the_table(finished):
    record = read_json(finished / "comparison.json")
    assert [(row["label"], row["strategy"]) for row in record["rows"]] == [
        ("frozen", "frozen"),
        ("upper bound", "joint"),
    ]
    for row in record["rows"]:
        for place, seed in enumerate(row["seeds"]):
            results = read_json(finished / f"seed_{seed}" / row["key"] / "results.json")
            assert (results["strategy"], results["seed"]) == (row["strategy"], seed)
            assert row["per_seed"]["LA"][place] == results["LA"]
    assert set(rows(finished)) == {"frozen", "upper bound"}
    assert record["rows"][1]["arguments"] == {"base_train_steps": 1}
    assert (finished / "figures" / "accuracy.png").is_file()


@pytest.mark.slow
def test_started_again_it_runs_what_is_missing_and_nothing_else(compare, finished):
    lost = finished / "seed_0" / "frozen"
    before = digests(lost / "adapters")
    page = read_json(finished / "comparison.json")["rows"]
    others = {p: p.stat().st_mtime_ns for p in finished.rglob("results.json") if lost not in p.parents}
    shutil.rmtree(lost)
    compare(finished.parent, *STRATEGIES)
    # Those of two bases among them.
    assert len(others) == 5
    assert digests(lost / "adapters") == before
    assert not (lost / "base").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())
    again = read_json(finished / "comparison.json")["rows"]
    assert [row["per_seed"]["LA"] for row in again] == [row["per_seed"]["LA"] for row in page]


@pytest.mark.slow
def test_a_failed_strategy_does_not_lose_the_others(compare, tmp_path):
    (tmp_path / "out" / "seed_0" / "frozen").mkdir(parents=True)
    # A file where a folder of the run should be.
    (tmp_path / "out" / "seed_0" / "frozen" / "adapters").write_text("in the way")
    done = compare(tmp_path, "--strategies", "frozen", "joint", "--seeds", "0", check=False)
    assert done.returncode == 1
    assert "error: failed runs: frozen (seed 0)" in done.stderr
    found = rows(tmp_path / "out")
    assert (found["frozen"]["seeds"], found["joint"]["seeds"]) == ("0", "1")
    assert found["joint"]["LA (%)"]
