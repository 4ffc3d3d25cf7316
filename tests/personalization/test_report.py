"""The table of a run, and what the report makes of records."""

from __future__ import annotations

import json
import shutil

import pytest
from concept_runs import run

from funlora_hf.evaluation.report import ForgettingError
from funlora_hf.personalization.report import _scores, summary_table
from funlora_hf.utils.files import read_mapping, write_json


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_summary_table():
    found = {"matrix": [], "own": 0.5, "end": 0.25, "forgetting": 0.3, "drop": 0.25}
    table = summary_table({"scores": {"attr": found, "leak": found}, "floor": {"attr": 0.1}, "ceiling": None})
    assert table.splitlines()[2:] == [
        "| attr | 0.100 | 0.500 | 0.250 | 0.300 | 0.250 |  |",
        "| leak |  | 0.500 | 0.250 | 0.300 | 0.250 |  |",
    ]


def test_only_scores_that_all_concepts_have():
    records = [[{"scores": {"a": 1.0, "b": 2.0}}], [{"scores": {"a": 0.5, "b": 2.0}}, {"scores": {"a": 0.0}}]]
    assert _scores(records).keys() == {"a"}
    assert _scores(records)["a"]["matrix"] == [[1.0], [0.5, 0.0]]
    assert _scores([[None], [None, None]]) == {}


def test_a_concept_that_has_changed_is_an_error(finished, inputs, tmp_path):
    """The results are written first; a resumed run says it again."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "results.json").unlink()
    (folder / "checkpoints/evaluation/after.json").unlink()
    record = folder / "checkpoints/evaluation/task_1/b0.json"
    write_json(record, {**read_mapping(record), "sha256": "0" * 64})
    for _ in range(2):
        with pytest.raises(ForgettingError, match=r"see zero_forgetting in .*results.json: \['b0'\]"):
            run(inputs, folder, resume_from_checkpoint="latest")
        results = json.loads((folder / "results.json").read_text())
        assert results["zero_forgetting"] == {"identical": False, "changed": ["b0"]}
