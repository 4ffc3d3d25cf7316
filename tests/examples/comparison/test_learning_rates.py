from __future__ import annotations

import math

import pytest
from runs import short_run

from comparison import learning_rates
from comparison.jobs import Outcome
from comparison.learning_rates import (
    MOST_WIDENINGS,
    Candidate,
    Scores,
    check_rates,
    choose_learning_rates,
    rate_argument,
)
from funlora_hf.continual.strategies.registry import STRATEGIES
from funlora_hf.utils.files import read_json


@pytest.fixture
def losses(monkeypatch):
    """Losses by strategy: functions of the rate's logarithm; `losses.jobs` are those that were run."""

    class Losses(dict):
        jobs = ()

    known = Losses()

    def run(jobs, folder, num_workers, **kwargs):
        known.jobs = [*known.jobs, *jobs]
        return [outcome(job) for job in jobs]

    def outcome(job):
        (rate,) = job.after_base.values()
        loss = known[job.arguments.training.strategy](math.log10(rate))
        return Outcome(error="failed") if loss is None else Outcome(results={"held_out_loss": {"mean": loss}})

    monkeypatch.setattr(learning_rates, "run_on_shared_bases", run)
    return known


def candidate(name, **overrides):
    return Candidate(name, name.upper(), short_run(strategy=name, **overrides))


def choose(folder, *candidates, rates=(1e-3, 1e-2)):
    return choose_learning_rates(candidates, rates, folder, 1)


def test_each_has_the_rate_of_its_lowest_loss(losses, tmp_path):
    losses |= {"funlora": lambda x: abs(x + 2), "finetune": lambda x: abs(x + 3)}
    rates = (1e-4, 1e-3, 1e-2, 1e-1)
    chosen = choose(tmp_path, candidate("funlora"), candidate("finetune"), rates=rates)
    assert chosen == {"funlora": 1e-2, "finetune": 1e-3}
    assert len(losses.jobs) == 8
    written = read_json(tmp_path / "learning_rates.json")
    assert (written["chosen"], written["at_edge"]) == (chosen, [])
    assert written["losses"]["funlora"] == {"0.0001": 2, "0.001": 1, "0.01": 0, "0.1": 1}
    assert written["arguments"] == {"funlora": "adapter_learning_rate", "finetune": "base_learning_rate"}


@pytest.mark.parametrize(("best", "more"), [(0.4, [0.1, 1.0, 10.0]), (-5.1, [1e-4, 1e-5, 1e-6])])
def test_the_grid_is_widened_where_the_best_is_at_its_edge(losses, tmp_path, best, more):
    losses["frozen"] = lambda x: (x - best) ** 2
    assert choose(tmp_path, candidate("frozen")) == {"frozen": pytest.approx(10 ** round(best))}
    assert [job.after_base["adapter_learning_rate"] for job in losses.jobs[2:]] == more


def test_a_best_that_stays_at_the_edge_is_said(losses, tmp_path, caplog):
    losses["frozen"] = lambda x: -x
    chosen = choose(tmp_path, candidate("frozen"), rates=(1e-6, 1e-5))
    assert len(losses.jobs) == 2 + MOST_WIDENINGS
    assert f"FROZEN: the best learning rate, {chosen['frozen']:g}, is at the edge" in caplog.text
    assert read_json(tmp_path / "learning_rates.json")["at_edge"] == ["frozen"]


def test_a_rate_that_fails_is_worse_than_any_other(losses, tmp_path):
    losses["frozen"] = lambda x: None if x > -1.5 else -x
    assert choose(tmp_path, candidate("frozen"), rates=(1e-3, 1e-2)) == {"frozen": 1e-2}
    assert len(losses.jobs) == 3
    losses["frozen"] = lambda x: math.nan
    with pytest.raises(
        RuntimeError, match=r"No learning rate of FROZEN gives a finite held-out loss: see the log\.txt"
    ):
        choose(tmp_path, candidate("frozen"))


@pytest.mark.parametrize(
    ("losses", "is_at_edge", "beyond"),
    [
        ({0.1: 1.0}, False, []),
        ({0.1: 1.0, 0.3: 2.0}, True, [0.0333]),
        ({0.1: 2.0, 0.2: 1.0}, True, [0.4]),
        ({0.1: 2.0, 0.2: 1.0, 0.4: math.inf}, False, []),
        # More than a run takes.
        ({10.0: 2.0, 900.0: 1.0}, True, []),
    ],
)
def test_the_grid_goes_on_beyond_its_edge_in_its_own_ratio(losses, is_at_edge, beyond):
    scores = Scores(losses)
    assert (scores.is_at_edge, scores.beyond()) == (is_at_edge, beyond)


def test_runs_of_the_grid_test_on_training_images_only(losses, tmp_path):
    losses |= {"replay": abs, "frozen": abs}
    options = {"num_inference_steps": 2}
    choose(tmp_path, candidate("replay", strategy_options=options), candidate("frozen"), rates=(0.1, 1, 9))
    replay, frozen = losses.jobs[0].arguments, losses.jobs[3].arguments
    assert replay.data.validation_fraction == frozen.data.validation_fraction == 0.2
    # What replay learned in the first task after the base can change in the second.
    assert (replay.data.num_tasks, frozen.data.num_tasks) == (3, 2)
    assert replay.training.strategy_options == {"num_inference_steps": 2, "classifier_train_steps": 1}
    assert len({job.folder for job in losses.jobs}) == 6
    assert all(job.folder.is_relative_to(tmp_path / "learning_rates") for job in losses.jobs)


def test_a_classifier_that_guides_the_drawing_is_trained_as_in_the_run(losses, tmp_path):
    losses |= {"ddgr": abs}
    choose(tmp_path, candidate("ddgr", strategy_options={"guidance_scale": 2}), rates=(0.1, 1))
    assert losses.jobs[0].arguments.training.strategy_options == {"guidance_scale": 2}


def test_what_has_no_held_out_loss_needs_a_rate_of_its_own(losses, tmp_path):
    one = candidate("diffclass", strategy_options={"pretrained": "there"}, unet_config=None)
    with pytest.raises(ValueError, match=r"DIFFCLASS has no held-out loss .* such as adapter_learning_rate=1e-4"):
        choose(tmp_path, candidate("funlora"), one)
    assert losses.jobs == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_rate_is_the_one_that_later_tasks_are_trained_with(strategy):
    whole_generator = strategy in ("joint", "finetune", "l2", "ewc", "hft", "mofo", "replay", "ddgr", "guide", "jdcl")
    assert rate_argument(strategy) == ("base_learning_rate" if whole_generator else "adapter_learning_rate")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_rates_are_above_zero(rate):
    with pytest.raises(ValueError, match=r"`learning_rates` has .*, expected numbers above 0"):
        check_rates([0.1, rate])
