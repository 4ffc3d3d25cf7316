from __future__ import annotations

import subprocess

import pytest
from comparisons import concept_results

from comparison.concept_choices import Choice
from comparison.concept_runs import Job, choose_rates, orders, run_all
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.strategies.registry import concept_strategy


def test_each_seed_has_an_order_of_its_own():
    names = [concept.name for concept in load_concepts("tiny")]
    found = orders(names, [0, 1, 2])
    assert found[0] == names
    assert sorted(found[1]) == sorted(names) != found[1]
    assert found == orders(names, [0, 1, 2])


def test_an_order_for_all_seeds():
    assert orders(["a", "b", "c"], [0, 1], ["c", "a"]) == {0: ["c", "a"], 1: ["c", "a"]}
    with pytest.raises(ValueError, match=r"`concept_order` has 'd', expected some of: a, b, c"):
        orders(["a", "b", "c"], [0], ["d"])


@pytest.mark.parametrize("tiny", [True, False])
def test_each_strategy_gets_the_rate_with_the_best_end(tiny, tmp_path, monkeypatch):
    rates = concept_strategy("lora").rates
    default = rates.tiny if tiny else rates.other
    asked = []

    def run(job, threads):
        rate = float(job.options[job.options.index("--concept_learning_rate") + 1])
        asked.append(job.options[-2:])
        return concept_results(0.5, {0.5: 0.2, 1.0: 0.9, 2.0: 0.4}[round(rate / default, 3)])

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
        return concept_results(0.5, 1 / (1 + abs(factor - best)))

    monkeypatch.setattr(Job, "run", run)
    choices = [Choice.parse("textual_inversion")]
    chosen, record = choose_rates(choices, [0.5, 1, 2], ["a", "b", "c"], 0, [], tmp_path, 1, tiny=True)
    assert chosen[0].arguments == {"token_learning_rate": f"{default * found:g}"}
    assert asked == [0.5, 1, 2, *more]
    assert record["textual_inversion"]["at_the_edge"] == at_the_edge


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
    run_all({name: Job(tmp_path / name, ()) for name in "ab"}, 2)
    assert found == [expected] * 2
