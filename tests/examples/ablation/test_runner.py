from __future__ import annotations

import pytest
from runs import short_run

from ablation.runner import AblationArguments, run_ablation
from ablation.variants import variants_of
from funlora_hf.utils.locks import FolderInUseError, folder_lock


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


def test_a_second_ablation_in_one_folder_is_refused(tmp_path):
    arguments = AblationArguments(seeds=[0])
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match="is in use by process"):
        run_ablation(arguments, short_run(output_dir=str(tmp_path)), variants_of(arguments.tables, arguments.variants))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
