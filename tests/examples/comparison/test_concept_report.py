from __future__ import annotations

from comparisons import concept_results

from comparison.concept_report import table


def test_the_table_has_means_over_seeds():
    text = table({"lora": [concept_results(0.8, 0.4), concept_results(0.6, 0.2)]})
    lines = text.splitlines()
    assert lines[2] == "| lora | 0.70 (0.80, 0.60) | 0.50 (0.60, 0.40) | 0.40 | 0.20 |"
    assert lines[4] == "Floor (the base with the noun) / ceiling (real images): attr 0.30 / 1.00."
    assert lines[8] == "| lora | 0.50 | 0.250 | 0.60 | 0.300 | - | 1,356 | 2,000 | 12 |"
    assert lines[10] == "Base prompts before learning: shape 0.99."


def test_what_was_not_measured_is_left_empty():
    text = table({"lora": [concept_results(0.8, 0.4, pairs=[])]})
    assert text.splitlines()[2] == "| lora | 0.80 | 0.60 | 0.40 |  |"


def test_the_table_has_the_norms_of_the_products():
    runs = [
        concept_results(0.8, 0.4, details={"product_norms": norms}) for norms in ([23.14, 0.5, 1e-5], [7.0, 7.0, 7.0])
    ]
    text = table({"lora": [concept_results(0.8, 0.4)] * 2, "clora:penalty=10": runs})
    assert text.endswith("0.99.\n\nNorms of the products of clora:penalty=10, first seed: 23.1, 0.5, 1e-05.")
