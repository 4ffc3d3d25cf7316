from __future__ import annotations

import csv
import io
from statistics import mean, stdev

import pytest
from seed_tables import as_csv

from ablation.tables import ablation_rows, as_markdown
from ablation.variants import TABLES


def run_of(value: float) -> dict:
    return {
        "LA": 90 + value,
        "AIA": 95 + value,
        "tasks": [[0, 1], [2], [3]],
        "held_out_loss": {"mean": 9.0, "per_class": {"0": 100.0, "1": 100.0, "2": 0.2 + value, "3": 0.4 + value}},
        "parameters_per_class": 1036,
        "parameters_per_class_with_vector": 1164,
        "nfe": 12,
        "seconds": {"total": 60 + value},
        "settings": {
            "ContinualTrainingArguments": {"adapter_learning_rate": 0.02, "adapter_alpha_rate": 3.0},
            "ModelArguments": {"peft_method": "funlora", "function": "cosine"},
        },
    }


def results(**changes):
    runs = {variant.key: [run_of(0.0), run_of(0.5), run_of(1.0)] for variant in TABLES["operations"]}
    return {**runs, **changes}


def test_means_and_spreads():
    row = ablation_rows(results(), ["operations"])[0]
    assert (row["table"], row["variant"], row["seeds"]) == ("operations", "mul", 3)
    assert row["LA (%)"] == mean([90, 90.5, 91])
    assert row["LA (%) std"] == stdev([90, 90.5, 91])
    # The classes of the base are left out: they are the same in every variant.
    assert abs(row["held-out loss"] - mean([0.3, 0.8, 1.3])) < 1e-12
    assert (row["learning rate"], row["alpha's multiple"]) == (0.02, 3)


def test_the_default_multiple_of_alpha_is_the_one_that_was_used():
    default = run_of(0.0)
    default["settings"]["ContinualTrainingArguments"]["adapter_alpha_rate"] = None
    assert ablation_rows(results(funlora=[default]), ["operations"])[0]["alpha's multiple"] == 10


def test_a_failed_run_is_left_out_and_counted():
    rows = ablation_rows(results(add=[None, run_of(1.0), None], mul_add=[None, None, None]), ["operations"])
    assert (rows[1]["seeds"], rows[1]["LA (%)"], rows[1]["LA (%) std"]) == (1, 91, None)
    assert (rows[2]["seeds"], rows[2]["LA (%)"]) == (0, None)
    assert "| mul-add | 0 | - | - |" in as_markdown(rows)


def test_accuracy_that_was_not_measured_leaves_the_rest():
    unmeasured = {**run_of(0.0), "LA": None, "AIA": None}
    row = ablation_rows(results(add=[unmeasured]), ["operations"])[1]
    assert row["LA (%)"] is None
    assert row["PPC"] == 1036


def test_csv_reads_back():
    rows = ablation_rows(results(), ["operations"])
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["variant"] for row in read] == ["mul", "add", "mul-add"]
    assert all(float(row["LA (%)"]) == 90.5 for row in read)


def test_markdown_rounds_and_shows_the_spread():
    lines = as_markdown(ablation_rows(results(), ["operations"])).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(
        "| operations | mul | 3 | 90.50 ± 0.50 | 95.50 ± 0.50 | 0.8000 ± 0.5000 | 1,036 | 1,164 |"
    )
    assert "| 12.0 |" in lines[2]
    assert lines[0].endswith("| learning rate | alpha's multiple |")
    assert lines[2].endswith("| 0.02 | 3 |")


@pytest.mark.parametrize(("peft_method", "function"), [("vanilla_mul", "cosine"), ("funlora", "identity")])
def test_adapters_without_alpha_have_no_multiple(peft_method, function):
    run = run_of(0.0)
    run["settings"]["ModelArguments"] = {"peft_method": peft_method, "function": function}
    rows = ablation_rows(results(add=[run]), ["operations"])
    assert [row["alpha's multiple"] for row in rows] == [3, None, 3]
    assert as_markdown(rows).splitlines()[3].endswith("| 0.02 | - |")
