from __future__ import annotations

import pytest
from runs import short_run

from funlora_hf.ablation.runner import AblationArguments, with_changes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": []}, r"`seeds` is \[\], expected different numbers"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\], expected different numbers"),
        ({"num_workers": 0}, "`num_workers` should be a positive integer"),
        ({"learning_rates": [0.01, -1.0]}, "`learning_rates` has -1, expected numbers above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        AblationArguments(**arguments)


def test_changes_reach_the_part_they_belong_to_and_leave_the_rest():
    reference = short_run()
    changed = with_changes(reference, {"seed": 7, "function": "power", "solver": "euler", "num_tasks": 1})
    assert (changed.training.seed, changed.model.function, changed.evaluation.solver) == (7, "power", "euler")
    assert changed.data.num_tasks == 1
    assert changed.training.base_train_steps == reference.training.base_train_steps
    assert reference.model.function == "cosine"
