from __future__ import annotations

import pytest

from funlora_hf.ablation.runner import AblationArguments


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
