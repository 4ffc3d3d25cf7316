"""The results of a run, as far as tables read them."""

from __future__ import annotations


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


QUALITY = {
    "extractor": "classifier",
    "frechet_distance": 5.408,
    "precision": 0.9,
    "recall": 0.8,
    "neighbours": 5,
    "num_real": 360,
    "num_generated": 360,
}
