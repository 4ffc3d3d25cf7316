from __future__ import annotations

import pytest
import torch
from comparisons import concept_results
from safetensors.torch import save_file

from comparison.concept_report import groups_of, panels, tables, write_report


def rows(text, label):
    """The cells of a strategy in each table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [cells for name, *cells in lines if name == label]


def test_the_tables_have_means_over_seeds():
    text = tables({"lora": [concept_results(0.8, 0.4), concept_results(0.6, 0.2)]})
    axes, scores, drift = rows(text, "lora")
    assert axes == ["0.50", "0.60", "0.70", "0.50", "0.40", "0.20", "1,356", "2,000", "12"]
    assert scores == ["0.70 (0.80, 0.60)", "0.50 (0.60, 0.40)", "0.25"]
    assert drift == ["0.250", "0.300", "-"]
    header = text.splitlines()[0]
    assert header.startswith(
        "| strategy | generality: shape of base prompts | the same with a concept's weights | learned: attr"
    )
    assert "\n\nFloor (the base with the noun) / ceiling (real images): attr 0.30 / 1.00.\n\n" in text
    assert "\n\nBase prompts before learning: shape 0.99.\n\n" in text


def test_what_was_not_measured_is_left_empty():
    # DINO alone, which has no score of prompts.
    score = concept_results(0.8, 0.4)["scores"]["attr"]
    drift = {"before": {}, "after_task": [{"same": 0.75}], "with_concept": {"a": {"same": 0.5}}}
    run = concept_results(0.8, 0.4, pairs=[], scores={"dino_i": score}, floor={}, ceiling={}, base_drift=drift)
    text = tables({"lora": [run]})
    axes, scores, drift = rows(text, "lora")
    assert axes[:6] == ["0.75", "0.50", "0.80", "0.60", "0.40", ""]
    assert scores == ["0.80", "0.60", ""]
    assert drift == ["", "", "-"]
    assert "Base prompts before" not in text
    assert not panels({"lora": [run]})[3].values["lora"]


@pytest.mark.parametrize(
    ("identical", "expected"), [((True, True), "yes"), ((True, False), "NO"), ((None, None), "-")]
)
def test_one_seed_whose_first_samples_changed_is_enough(identical, expected):
    runs = [concept_results(0.8, 0.8, zero_forgetting={"identical": one}) for one in identical]
    assert rows(tables({"lora": runs}), "lora")[2][-1] == expected


def test_the_tables_have_the_norms_of_the_products():
    runs = [
        concept_results(0.8, 0.4, details={"product_norms": norms}) for norms in ([23.14, 0.5, 1e-5], [7.0, 7.0, 7.0])
    ]
    text = tables({"lora": [concept_results(0.8, 0.4)] * 2, "clora:penalty=10": runs})
    assert text.endswith("\n\nNorms of the products of clora:penalty=10, first seed: 23.1, 0.5, 1e-05.")


def test_the_panels_have_the_four_axes_of_each_seed():
    found = panels({"lora": [concept_results(0.8, 0.4), concept_results(0.6, 0.2)]})
    expected = {
        "generality kept": [0.5, 0.5],
        "target learned": [0.8, 0.6],
        "kept": [0.6, 0.4],
        "across tasks": [0.2, 0.2],
    }
    assert {panel.title: panel.values["lora"] for panel in found} == {
        title: pytest.approx(values) for title, values in expected.items()
    }
    assert found[0].rings["lora"] == pytest.approx([0.6, 0.6])
    assert [panel.marks for panel in found] == [{"base": 0.99}, *[{"floor": 0.3, "ceiling": 1.0}] * 2, {}]


def test_strategies_are_in_two_groups_with_the_best_first():
    results = {
        "poor": [concept_results(0.5, 0.5)],
        "cns": [concept_results(0.9, 0.1, strategy="cns")],
        "lora": [concept_results(0.8, 0.8)],
        "joint": [concept_results(0.9, 0.9, strategy="joint")],
    }
    expected = {"an adapter for each concept": ["lora", "poor"], "one model for all": ["joint", "cns"]}
    assert groups_of(results) == expected
    del results["cns"], results["joint"]
    assert groups_of(results) == {"an adapter for each concept": ["lora", "poor"]}


def test_samples_of_what_never_changes_are_drawn_again(tmp_path, drawn_labels, saved_figures):
    for label, tasks in (("lora", [1]), ("cns", [1, 2])):
        for task in tasks:
            path = tmp_path / label / "checkpoints" / "evaluation" / f"task_{task}" / "a.safetensors"
            path.parent.mkdir(parents=True)
            save_file({"images": torch.full((2, 3, 8, 8), 10 * task, dtype=torch.uint8)}, path)
    results = {"cns": [concept_results(0.8, 0.4, strategy="cns")], "lora": [concept_results(0.8, 0.8)]}
    folders = {label: tmp_path / label for label in results}
    text = write_report(results, tmp_path, "python compare.py", folders, ["a", "b"])
    assert (tmp_path / "comparison.md").read_text() == f"{text}\n\nCommand: `python compare.py`\n"
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"axes.png", "samples.png", "scores.png"}
    assert drawn_labels == ["lora", "cns", "1", "2", "a after 1 to 2 concepts"]
    scores = {text.get_position(): text.get_text() for text in saved_figures[1].axes[0].texts}
    assert scores == {(0, 1): "0.80", (1, 1): "0.80", (0, 3): "0.80", (1, 3): "0.60"}
