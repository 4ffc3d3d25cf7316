"""What is written: that the page is whole, safe and self-contained, and that all files agree."""

from __future__ import annotations

import base64
import csv
import json
import platform
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from comparisons import NAMES, made_up_comparison

from comparison.figures import cost_figure
from comparison.jobs import Outcome
from comparison.report import write_comparison
from funlora_hf.utils.files import read_json


COMMAND = (
    "python examples/compare_strategies.py --output_dir /home/someone/private/out --dataset_name https://hub.org/a/b"
)
HOST = "host-of-someone"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds, with a check that all tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    compared = made_up_comparison(folder, NAMES[:4], failed=(("joint", 1),))
    hostile = replace(compared[0].choice, label='<script>alert("x")</script> & co')
    compared[0] = replace(compared[0], choice=hostile)
    error = "FileNotFoundError: no /home/someone/private/data/train.parquet; see https://hub.org/a/b"
    outcomes = (Outcome(error=error), *compared[3].outcomes[1:])
    compared[3] = replace(compared[3], outcomes=outcomes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: HOST)
        return folder, compared, write_comparison(compared, folder, command=COMMAND)


def test_the_page_is_self_contained(written):
    folder, _, _ = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "poster", "action"):
            assert value.startswith("data:image/png;base64,")
    style = (folder / "report.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_the_page_holds_each_row(written):
    folder, compared, _ = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    record = read_json(folder / "comparison.json")
    rows = page.rows[2:]
    assert [row[0] for row in rows] == [one.choice.label for one in compared]
    assert [row[1] for row in rows] == ["3", "3", "2 of 3", "2 of 3"]
    for row, of_json in zip(rows, record["rows"], strict=True):
        assert len(row) == 2 + len(record["columns"])
        assert row[2] == f"{of_json['mean']['LA']:.2f} ± {of_json['std']['LA']:.2f}"


def test_the_page_holds_the_figures_as_they_are_in_their_folder(written):
    folder, _, _ = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    inlined = [base64.b64decode(value.partition(",")[2]) for tag, name, value in page.attributes if name == "src"]
    files = [
        (folder / "figures" / f"{name}.png").read_bytes() for name in ("accuracy", "forgetting", "samples", "cost")
    ]
    assert inlined == files
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        f"{name}.png" for name in ("accuracy", "forgetting", "samples", "cost")
    )


def test_a_task_without_training_costs_nothing_in_the_figure(tmp_path, monkeypatch):
    """Joint only looks at the clock for tasks in which it trains nothing. Drawn are means over the seeds."""
    compared = made_up_comparison(tmp_path, ("joint", "funlora"))
    for outcome in compared[0].outcomes:
        outcome.results["seconds"]["training_per_task"][1:] = [2e-5, 9e-6, 1e-4, 3e-5]
    drawn = []
    monkeypatch.setattr(
        "comparison.report.cost_figure",
        lambda seconds, *others: drawn.append(seconds) or cost_figure(seconds, *others),
    )
    write_comparison(compared, tmp_path, command=COMMAND)
    assert drawn[0]["joint"] == pytest.approx([150, 0, 0, 0, 0], abs=0)
    expected = np.mean([outcome.results["seconds"]["training_per_task"] for outcome in compared[1].outcomes], axis=0)
    np.testing.assert_allclose(drawn[0]["funlora"], expected)


def test_failed_runs_are_named_everywhere(written):
    folder, _, text = written
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    assert "joint, seed 1: " in words
    assert "<joint> & seed 1 went wrong" in words
    assert "10 of 12 runs finished" in words
    for table in (text, (folder / "comparison.md").read_text(encoding="utf-8")):
        assert "Failed: joint, seed 1: ValueError: <joint> & seed 1 went wrong" in table
    failed = read_json(folder / "comparison.json")["failed"]
    assert [(run["label"], run["seed"]) for run in failed] == [("joint", 1), ("finetune", 0)]


def test_nothing_says_where_it_was_made(written):
    folder, _, _ = written
    for name in ("report.html", "comparison.json", "comparison.md", "comparison.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        for secret in ("someone", "private", str(folder), HOST):
            assert secret not in text
    record = read_json(folder / "comparison.json")
    assert record["command"] == (
        "python examples/compare_strategies.py --output_dir out --dataset_name https://hub.org/a/b"
    )
    assert record["failed"][1]["error"] == "FileNotFoundError: no train.parquet; see https://hub.org/a/b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--output_dir=/home/me/out --x ~/y ../z/a b/c", "--output_dir=out --x ~/y ../z/a b/c"),
        ("'/home/me/my runs/out/' /tmp/a:/tmp/b", "'my runs/out/' a:b"),
        ("https://hub.org/a/b s3://bucket/key 3/4 -/+", "https://hub.org/a/b s3://bucket/key 3/4 -/+"),
    ],
)
def test_absolute_paths_keep_their_last_part(tmp_path, text, shown):
    write_comparison(made_up_comparison(tmp_path, seeds=(0,)), tmp_path, command=text)
    assert read_json(tmp_path / "comparison.json")["command"] == shown


def test_the_files_agree(written):
    folder, compared, _ = written
    record = json.loads((folder / "comparison.json").read_text())
    markdown = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[1] for line in markdown[2:6]] == ["3", "3", "2 of 3", "2 of 3"]
    of_csv = list(csv.DictReader((folder / "comparison.csv").open(encoding="utf-8")))
    for row, line, one in zip(record["rows"], of_csv, compared, strict=True):
        assert line["strategy"] == row["label"]
        for key, title in record["columns"].items():
            assert (float(line[title]) if line[title] else None) == row["mean"][key]
        values = [None if outcome.results is None else outcome.results["LA"] for outcome in one.outcomes]
        assert row["per_seed"]["LA"] == values
    assert record["versions"] == "funlora-hf 0.1.0, torch 2.13.0"


def test_figures_of_what_was_not_measured_go(tmp_path):
    compared = made_up_comparison(tmp_path)
    write_comparison(compared, tmp_path, command="x")
    bare = []
    for one in compared:
        outcomes = [
            Outcome(results={**run, "A": None, "accuracy_matrix": None, "memory_per_task": None, "seconds": {}})
            for run in one.finished
        ]
        bare.append(replace(one, outcomes=tuple(outcomes)))
    write_comparison(bare, tmp_path, command="x")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["samples.png"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<img") == 1


def test_the_report_is_written_if_every_run_failed(tmp_path):
    failed = tuple((name, seed) for name in NAMES[:3] for seed in range(3))
    write_comparison(made_up_comparison(tmp_path, failed=failed), tmp_path, command="x")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "0 of 9 runs finished" in " ".join(page.words)
    assert [row[1] for row in page.rows[2:]] == ["0 of 3"] * 3
    assert "img" not in page.tags


def test_the_table_comes_without_matplotlib(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    write_comparison(made_up_comparison(tmp_path), tmp_path, command="x")
    assert "No figures" in caplog.text
    assert len(Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows) == 5


def test_more_strategies_than_figures_tell_apart_have_a_table(tmp_path, caplog):
    names = tuple(f"funlora {place}" for place in range(15))
    write_comparison(made_up_comparison(tmp_path, names, seeds=(0,)), tmp_path, command="x")
    assert "No figures: they tell 14 strategies apart, not 15" in caplog.text
    assert len(Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows) == 17
