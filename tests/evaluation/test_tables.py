from __future__ import annotations

from pathlib import Path

from funlora_hf.evaluation.tables import markdown_table, mean_table, summary_table, what_next


def results(seed: int, la: float) -> dict:
    return {
        "strategy": "funlora",
        "dataset": "digits",
        "seed": seed,
        "A": [100.0, la],
        "LA": la,
        "AIA": (100 + la) / 2,
        "forgetting": 1.5,
        "held_out_loss": {"mean": 0.25, "per_class": {}},
        "parameters_per_class": 10,
        "parameters_per_class_with_vector": 14,
        "zero_forgetting": {
            "identical": True,
            "classes_compared": 4,
            "classes_changed": [],
            "base_sha256_before": "a",
            "base_sha256_after": "a",
        },
        "seconds": {"total": 60.0},
    }


def test_the_summary_says_what_was_measured():
    text = summary_table(results(0, 98.0))
    for expected in (
        "LA (%)               98.00   last accuracy: the mean over all tasks, after the last one\n",
        "AIA (%)              99.00   average incremental accuracy: the mean of A_t over t\n",
        "10 (14 with",
        "equal to the bit, base unch",
    ):
        assert expected in text


QUALITY = {
    "extractor": "classifier",
    "frechet_distance": 5.408,
    "precision": 0.9,
    "recall": 0.8,
    "neighbours": 5,
    "num_real": 360,
    "num_generated": 360,
}


def test_only_in_the_features_of_inception_is_the_distance_called_fid():
    text = summary_table({**results(0, 98.0), "image_quality": QUALITY})
    assert "Frechet distance      5.41\nprecision            0.900\nrecall               0.800\n" in text
    assert "FID" not in text
    assert "FID                   5.41" in summary_table(
        {**results(0, 98.0), "image_quality": {**QUALITY, "extractor": "inception"}}
    )
    for without in ({}, {"image_quality": None}):
        assert "recall" not in summary_table({**results(0, 98.0), **without})


def test_image_quality_has_a_mean_where_all_runs_measured_it_alike():
    def run(seed, **changes):
        return {**results(seed, 98.0), "image_quality": {**QUALITY, **changes}}

    text = mean_table([run(0), run(1, frechet_distance=7.408, recall=0.6)])
    assert "Frechet distance      6.41 +- 1.41" in text
    assert "recall               0.700 +- 0.141" in text
    for other in (results(1, 98.0), run(1, extractor="inception"), run(1, num_real=100), run(1, neighbours=3)):
        assert "recall" not in mean_table([run(0), other])


def test_what_was_not_measured_is_said():
    unmeasured = {**results(0, 98.0), **dict.fromkeys(("A", "LA", "AIA", "forgetting"))}
    assert "not measured" in summary_table(unmeasured)
    assert "LA (%)" not in mean_table([unmeasured, unmeasured])


def test_a_change_is_shouted():
    changed = results(0, 98.0)
    changed["zero_forgetting"] |= {"identical": False, "classes_changed": [3], "base_sha256_after": "b"}
    assert "CHANGED: classes [3], base CHANGED" in summary_table(changed)


def test_samples_of_another_machine_are_not_called_changed():
    elsewhere = results(0, 98.0)
    elsewhere["zero_forgetting"] |= {"identical": None, "classes_compared": 0}
    assert "first samples not compared (other machine or thread count), base unchanged" in summary_table(elsewhere)


def test_the_mean_is_over_the_runs():
    text = mean_table([results(0, 97.0), results(1, 99.0)])
    assert "seeds 0, 1" in text
    assert "LA (%)               98.00 +- 1.41" in text


def test_a_markdown_table_escapes_bars_and_aligns_numbers_to_the_right():
    table = markdown_table(["run", "rank"], [("a|b", 3), ("c", "-")])
    assert table == "| run | rank |\n|---|---:|\n| a\\|b | 3 |\n| c | - |"
    assert markdown_table(["a", "b"], [], texts=2) == "| a | b |\n|---|---|"


def test_a_run_ends_with_where_its_parts_lie_and_what_to_type_next():
    run = {"peft_method": "funlora", "nfe": 12.0, "class_order": [0, 1, 7]}
    assert what_next(run, Path("my run")).splitlines() == [
        "my run holds base/, adapters/class_<id>/, results.json and figures/. Next:",
        "  funlora sample 'my run' --classes 7",
        "  funlora add IMAGES --to 'my run'",
        "  funlora push 'my run' USER/REPO",
    ]
    joint = what_next({**run, "peft_method": None, "nfe": None}, Path("out"))
    assert "base/, model/, results.json" in joint
    assert "funlora add" not in joint
    assert "  funlora evaluate out\n" in joint
