from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from comparisons import NAMES, made_up_comparison
from seed_tables import as_csv

from comparison.jobs import Outcome
from comparison.tables import as_markdown, as_text, columns_of, flat_rows, rows_of


def table(compared):
    columns = columns_of(compared)
    return columns, rows_of(compared, columns)


def with_results(compared, change):
    """The same with changed results of every run."""
    return [
        replace(one, outcomes=tuple(Outcome(results=change(outcome.results)) for outcome in one.outcomes))
        for one in compared
    ]


def test_cells_are_means_and_deviations_over_the_seeds(tmp_path):
    compared = made_up_comparison(tmp_path, NAMES)
    _, rows = table(compared)
    for one, row in zip(compared, rows, strict=True):
        matrices = [
            np.array([line + [np.nan] * (5 - len(line)) for line in run["accuracy_matrix"]]) for run in one.finished
        ]
        last = [matrix[-1].mean() for matrix in matrices]
        assert row.means["LA"] == pytest.approx(np.mean(last))
        assert row.deviations["LA"] == pytest.approx(np.std(last, ddof=1))
        aia = [np.mean([np.nanmean(line) for line in matrix]) for matrix in matrices]
        assert row.means["AIA"] == pytest.approx(np.mean(aia))
        drops = [(np.nanmax(matrix, axis=0) - matrix[-1])[:-1].mean() for matrix in matrices]
        assert row.means["forgetting"] == pytest.approx(np.mean(drops))
        seconds = [np.sum(run["seconds"]["training_per_task"]) for run in one.finished]
        assert row.means["training_seconds"] == pytest.approx(np.mean(seconds))
        kept = np.array([[task["persistent"] for task in run["memory_per_task"]] for run in one.finished]) / 1e6
        assert row.means["kept_megabytes"] == pytest.approx(kept[:, -1].mean())
        assert row.means["kept_growth_megabytes"] == pytest.approx((kept[:, -1] - kept[:, 1]).mean())
        assert row.means["training_images"] == 22_400 + 4 * 9_600
        distances = [run["image_quality"]["frechet_distance"] for run in one.finished]
        assert row.values["frechet_distance"] == distances


def test_a_failed_run_is_left_out_and_counted(tmp_path):
    columns, (first, second, _) = table(
        made_up_comparison(tmp_path, failed=(("funlora", 1), *(("frozen", s) for s in range(3))))
    )
    assert (first.seeds_text, second.seeds_text) == ("2 of 3", "0 of 3")
    known = [value for value in first.values["LA"] if value is not None]
    assert first.values["LA"][1] is None
    assert first.means["LA"] == pytest.approx(np.mean(known))
    assert {second.cell(column) for column in columns} == {"-"}


def test_what_older_runs_lack_or_could_not_measure_is_a_dash(tmp_path):
    kept = ("tasks", "dataset", "seed", "nfe")

    def older(results):
        lacking = {key: results[key] for key in kept}
        return {**lacking, "LA": None, "image_quality": None, "own_classifier": None, "seconds": {"training": 7.0}}

    columns, rows = table(with_results(made_up_comparison(tmp_path), older))
    for row in rows:
        shown = {column.key: row.cell(column) for column in columns}
        assert shown.pop("nfe") == "12.0"
        assert shown.pop("training_seconds") == "7.0"
        assert set(shown.values()) == {"-"}
    assert "Frechet distance (not measured)" in [column.title for column in columns]


def test_a_mean_is_not_of_some_of_the_finished_runs(tmp_path):
    def second_lacks_it(results):
        return {**results, "LA": None} if results["seed"] == 1 else results

    _, rows = table(with_results(made_up_comparison(tmp_path), second_lacks_it))
    assert rows[0].means["LA"] is None
    assert rows[0].means["AIA"] is not None


@pytest.mark.parametrize(
    ("extractors", "title"),
    [
        (("cnn",), "Frechet distance (cnn)"),
        (("inception",), "FID (inception)"),
        (("inception", "cnn"), "Frechet distance (cnn or inception)"),
    ],
)
def test_a_distance_is_called_fid_only_of_inception_features(tmp_path, extractors, title):
    def of_extractor(results):
        name = extractors[results["seed"] % len(extractors)]
        return {**results, "image_quality": {**results["image_quality"], "extractor": name}}

    columns, _ = table(with_results(made_up_comparison(tmp_path), of_extractor))
    assert title in [column.title for column in columns]


def test_a_run_of_two_tasks_has_no_growth(tmp_path):
    _, rows = table(made_up_comparison(tmp_path, tasks=2))
    assert rows[0].means["kept_growth_megabytes"] is None
    assert rows[0].means["kept_megabytes"] == pytest.approx(2.635)


def test_markdown_and_csv_have_all_rows(tmp_path):
    compared = made_up_comparison(tmp_path, NAMES)
    compared[0] = replace(compared[0], choice=replace(compared[0].choice, label="a|b"))
    columns, rows = table(compared)
    lines = as_markdown(rows, columns).splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[2].startswith(r"| a\|b | 3 | ")
    read = list(csv.DictReader(io.StringIO(as_csv(flat_rows(rows, columns)))))
    assert [row["strategy"] for row in read] == ["a|b", *NAMES[1:]]
    for row, of_csv in zip(rows, read, strict=True):
        assert float(of_csv["LA (%)"]) == row.means["LA"]
        assert float(of_csv["LA (%) std"]) == row.deviations["LA"]


def test_the_table_for_a_terminal_fits_it_and_has_every_cell(tmp_path):
    columns, rows = table(made_up_comparison(tmp_path, NAMES))
    text = as_text(rows, columns)
    assert max(map(len, text.splitlines())) <= 120
    first = text.partition("\n\n")[0].splitlines()
    assert "LA (%)" in first[0]
    assert "PPC" in first[0]
    for row in rows:
        for column in columns:
            assert row.cell(column) in text
    measured = [column for column in columns if any(row.means[column.key] is not None for row in rows)]
    assert [column.title in text for column in columns] == [column in measured for column in columns]


def test_the_learning_rate_is_that_of_the_tasks_after_the_base(tmp_path):
    settings = {"ContinualTrainingArguments": {"base_learning_rate": 3e-4, "adapter_learning_rate": 0.02}}
    compared = with_results(
        made_up_comparison(tmp_path, ("funlora", "finetune", "joint")),
        lambda results: {**results, "settings": settings},
    )
    columns, rows = table(compared)
    (rate,) = [column for column in columns if column.key == "learning_rate"]
    assert [row.cell(rate) for row in rows] == ["0.02", "0.0003", "0.0003"]
