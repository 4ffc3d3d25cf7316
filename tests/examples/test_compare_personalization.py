"""The comparison of strategies that learn concepts, from its command to what it writes."""

from __future__ import annotations

import json
import sys

import compare_personalization
import pytest
from comparisons import concept_results

from comparison.concept_runs import Job
from funlora_hf.utils.files import write_json


def test_a_failed_run_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def run(job, threads):
        if "naive_lora" in job.options:
            return None
        write_json(job.folder / "results.json", concept_results(0.8, 0.8))
        return concept_results(0.8, 0.8)

    monkeypatch.setattr(Job, "run", run)
    arguments = ["--strategies", "lora", "naive_lora", "--seeds", "0", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare_personalization.py", *arguments])
    with pytest.raises(SystemExit, match=r"failed runs: .*naive_lora"):
        compare_personalization.main()
    assert "| lora |" in (tmp_path / "comparison.md").read_text()
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["results"].keys() == {"lora"}
    assert len(written["failed"]) == 1
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"axes.png", "scores.png"}


@pytest.mark.slow
def test_two_strategies_from_start_to_end(tmp_path, monkeypatch, capsys):
    given = ["--strategies", "funlora", "naive_lora:rank=2", "--seeds", "1", "--output_dir", str(tmp_path)]
    given += ["--max_train_steps", "2", "--num_samples_per_prompt", "1", "--num_inference_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_personalization.py", *given])
    compare_personalization.main()
    rows = [line.split(" | ")[0] for line in (tmp_path / "comparison.md").read_text().splitlines()[2:4]]
    assert rows == ["| funlora", "| naive_lora:rank=2"]
    assert (tmp_path / "figures" / "samples.png").stat().st_size > 0
    folders = {path.parent.name for path in tmp_path.glob("seed_1/*/results.json")}
    assert folders == {"funlora", "naive_lora:rank=2"}
