"""The comparison of strategies that learn concepts: what it runs, chooses and writes."""

from __future__ import annotations

import json
import subprocess
import sys

import compare_personalization
import pytest
from compare_personalization import Choice, Job, check, choose_rates, orders, table

from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.strategies.registry import concept_strategy
from funlora_hf.utils.files import write_json


def results(own, end, **other):
    """Results of a run with one score, of two concepts."""
    score = {
        "matrix": [[own], [end, own]],
        "own": own,
        "end": (own + end) / 2,
        "forgetting": own - end,
        "drop": own - end,
    }
    return {
        "scores": {"attr": score},
        "floor": {"attr": 0.3},
        "ceiling": {"attr": 1.0},
        "numbers_per_concept": 1356,
        "bytes_kept": 2000,
        "seconds": {"training": 12.4},
        "base_drift": {
            "before": {"shape": 0.99},
            "after_task": [{"shape": 0.5, "change": 0.25}, None],
            "with_concept": {"a": {"shape": 0.5, "change": 0.2}, "b": {"shape": 0.7, "change": 0.4}},
        },
        "pairs": [{"prompt": "a and b", "scores": {"a": {"attr": 0.1}, "b": {"attr": 0.3}}}],
        "zero_forgetting": {"identical": None},
        "details": {},
        **other,
    }


def test_a_choice_knows_options_of_the_strategy_from_arguments_of_the_run():
    choice = Choice.parse("clora:penalty=10,rank=2,target_modules=kv+cross,label=weak")
    assert (choice.name, choice.label) == ("clora", "weak")
    expected = "--strategy clora --strategy_options penalty=10 --rank 2 --target_modules kv cross"
    assert choice.options() == expected.split()
    assert Choice.parse("lora") == Choice("lora", "lora")


@pytest.mark.parametrize(
    ("texts", "shared", "error"),
    [
        (["clora:penalty"], [], "'penalty' has no value"),
        (["nothing"], [], "`strategy` is 'nothing'"),
        (["lora", "lora"], [], "expected each label once"),
        (["clora:penalty=much"], [], "`penalty`"),
        (["lora"], ["--seed", "1"], "--seed is given for all runs"),
        (["textual_inversion"], ["--concept_train_steps", "0"], "`concept_train_steps` should be a positive integer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(texts, shared, error):
    with pytest.raises(ValueError, match=error):
        check([Choice.parse(text) for text in texts], shared)


def test_each_seed_has_an_order_of_its_own():
    names = [concept.name for concept in load_concepts("tiny")]
    found = orders(names, [0, 1, 2])
    assert found[0] == names
    assert sorted(found[1]) == sorted(names) != found[1]
    assert found == orders(names, [0, 1, 2])


@pytest.mark.parametrize("tiny", [True, False])
def test_each_strategy_gets_the_rate_with_the_best_end(tiny, tmp_path, monkeypatch):
    rates = concept_strategy("lora").rates
    default = rates.tiny if tiny else rates.other
    asked = []

    def run(job, threads):
        rate = float(job.options[job.options.index("--concept_learning_rate") + 1])
        asked.append(job.options[-2:])
        return results(0.5, {0.5: 0.2, 1.0: 0.9, 2.0: 0.4}[round(rate / default, 3)])

    monkeypatch.setattr(Job, "run", run)
    choices = [Choice.parse("lora"), Choice.parse("naive_lora:concept_learning_rate=0.1")]
    chosen, record = choose_rates(choices, [0.5, 1, 2], ["a", "b", "c"], 0, [], tmp_path, 1, tiny=tiny)
    assert chosen[0].arguments == {"concept_learning_rate": f"{default:g}"}
    assert chosen[1] == choices[1]
    assert record.keys() == {"lora"}
    assert not record["lora"]["at_the_edge"]
    assert asked == [("a", "b")] * 3


@pytest.mark.parametrize(
    ("best", "found", "more", "at_the_edge"),
    [(0.25, 0.25, [0.25, 0.125], False), (8.0, 8.0, [4, 8, 16], False), (100.0, 16.0, [4, 8, 16], True)],
)
def test_rates_beyond_the_edge_are_tried(best, found, more, at_the_edge, tmp_path, monkeypatch):
    default, asked = concept_strategy("textual_inversion").token_rates.tiny, []

    def run(job, threads):
        factor = float(job.options[job.options.index("--token_learning_rate") + 1]) / default
        asked.append(round(factor, 4))
        return results(0.5, 1 / (1 + abs(factor - best)))

    monkeypatch.setattr(Job, "run", run)
    choices = [Choice.parse("textual_inversion")]
    chosen, record = choose_rates(choices, [0.5, 1, 2], ["a", "b", "c"], 0, [], tmp_path, 1, tiny=True)
    assert chosen[0].arguments == {"token_learning_rate": f"{default * found:g}"}
    assert asked == [0.5, 1, 2, *more]
    assert record["textual_inversion"]["at_the_edge"] == at_the_edge


def test_the_table_has_means_over_seeds():
    text = table({"lora": [results(0.8, 0.4), results(0.6, 0.2)]})
    lines = text.splitlines()
    assert lines[2] == "| lora | 0.70 (0.80, 0.60) | 0.50 (0.60, 0.40) | 0.40 | 0.20 |"
    assert lines[4] == "Floor (the base with the noun) / ceiling (real images): attr 0.30 / 1.00."
    assert lines[8] == "| lora | 0.50 | 0.250 | 0.60 | 0.300 | - | 1,356 | 2,000 | 12 |"
    assert lines[10] == "Base prompts before learning: shape 0.99."


def test_what_was_not_measured_is_left_empty():
    text = table({"lora": [results(0.8, 0.4, pairs=[])]})
    assert text.splitlines()[2] == "| lora | 0.80 | 0.60 | 0.40 |  |"


def test_the_table_has_the_norms_of_the_products():
    runs = [results(0.8, 0.4, details={"product_norms": norms}) for norms in ([23.14, 0.5, 1e-5], [7.0, 7.0, 7.0])]
    text = table({"lora": [results(0.8, 0.4)] * 2, "clora:penalty=10": runs})
    assert text.endswith("0.99.\n\nNorms of the products of clora:penalty=10, first seed: 23.1, 0.5, 1e-05.")


def test_a_failed_run_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def run(job, threads):
        if "naive_lora" in job.options:
            return None
        write_json(job.folder / "results.json", results(0.8, 0.8))
        return results(0.8, 0.8)

    monkeypatch.setattr(Job, "run", run)
    arguments = ["--strategies", "lora", "naive_lora", "--seeds", "0", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare_personalization.py", *arguments])
    with pytest.raises(SystemExit, match=r"failed runs: .*naive_lora"):
        compare_personalization.main()
    assert "| lora |" in (tmp_path / "comparison.md").read_text()
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["results"].keys() == {"lora"}
    assert len(written["failed"]) == 1
    assert (tmp_path / "figures" / "scores.png").stat().st_size > 0


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("3", "3")])
def test_runs_at_a_time_share_the_cores(tmp_path, monkeypatch, given, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    found = []

    def run(command, *, env, **others):
        found.append(env["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("subprocess.run", run)
    compare_personalization.run_all({name: Job(tmp_path / name, ()) for name in "ab"}, 2)
    assert found == [expected] * 2


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
