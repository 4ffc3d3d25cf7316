from __future__ import annotations

from pathlib import Path

import pytest
from results import QUALITY, results

from funlora_hf.continual.costs import Part
from funlora_hf.evaluation.tables import costs_table, summary_table, what_next


def test_the_summary_says_what_was_measured():
    text = summary_table(results(0, 98.0))
    for expected in (
        "LA (%)               98.00   last accuracy: the mean over all tasks, after the last one\n",
        "AIA (%)              99.00   average incremental accuracy: the mean of A_t over t\n",
        "10 (14 with",
        "equal to the bit, base unch",
    ):
        assert expected in text


def test_only_in_the_features_of_inception_is_the_distance_called_fid():
    text = summary_table({**results(0, 98.0), "image_quality": QUALITY})
    assert "Frechet distance      5.41\nprecision            0.900\nrecall               0.800\n" in text
    assert "FID" not in text
    assert "FID                   5.41" in summary_table(
        {**results(0, 98.0), "image_quality": {**QUALITY, "extractor": "inception"}}
    )
    for without in ({}, {"image_quality": None}):
        assert "recall" not in summary_table({**results(0, 98.0), **without})


def test_the_class_that_is_recognised_least_is_named():
    found = {"mean": 97.25, "per_class": {"0": 99.0, "1": 95.5}}
    measured = {**results(0, 98.0), "class_names": {"0": "zero", "1": "one"}, "recognised": found}
    assert "recognised (%)       97.25   least: 95.50, one\n" in summary_table(measured)
    assert "recognised" not in summary_table({**measured, "recognised": None})


def test_what_was_not_measured_is_said():
    unmeasured = {**results(0, 98.0), **dict.fromkeys(("A", "LA", "AIA", "forgetting"))}
    assert "not measured" in summary_table(unmeasured)


def test_a_change_is_shouted():
    changed = results(0, 98.0)
    changed["zero_forgetting"] |= {"identical": False, "classes_changed": [3], "base_sha256_after": "b"}
    assert "CHANGED: classes [3], base CHANGED" in summary_table(changed)


def test_samples_of_another_machine_are_not_called_changed():
    elsewhere = results(0, 98.0)
    elsewhere["zero_forgetting"] |= {"identical": None, "classes_compared": 0}
    assert "first samples not compared (other machine or thread count), base unchanged" in summary_table(elsewhere)


def test_a_run_ends_with_where_its_parts_lie_and_what_to_type_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my run/base", "my run/adapters", "out/base", "out/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder).parent.joinpath("results.json").touch()
    run = {"peft_method": "funlora", "nfe": 12.0, "class_order": [0, 1, 7]}
    assert what_next(run, Path("my run")).splitlines() == [
        "my run holds base/, adapters/class_<id>/, results.json and figures/. Next:",
        "  funlora sample 'my run' --classes 7",
        "  funlora add IMAGES --to 'my run'",
        "  funlora push 'my run' USER/REPO",
    ]
    (tmp_path / "my run" / "adapters").rmdir()
    *_, add, _ = what_next(run, Path("my run")).splitlines()
    assert add == "  funlora add IMAGES --to 'my run'  # makes the first adapter"
    assert what_next(run, Path("my run")).startswith("my run holds base/, results.json and figures/. Next:")
    joint = what_next({**run, "peft_method": None, "nfe": None}, Path("out"))
    assert "base/, model/, results.json" in joint
    assert "funlora add" not in joint
    assert "  funlora evaluate out\n" in joint


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (59, "59 s"), (90, "1.5 min"), (3600, "1 h"), (3_067_200, "852 h")]
)
def test_costs_are_in_a_unit_that_fits(seconds, text):
    part = Part("training: base", "steps", 2, seconds=seconds / 2)
    assert [line.split("  ")[-1].strip() for line in costs_table([part]).splitlines()[2:]] == [text]
