from __future__ import annotations

from dataclasses import asdict

import pytest
from comparisons import made_up_comparison
from runs import short_run

from comparison import bases, runner
from comparison.jobs import Outcome
from comparison.runner import ComparisonArguments, failures, run_comparison
from funlora_hf.utils.locks import FolderInUseError, folder_lock


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": []}, r"`seeds` is \[\], expected different numbers"),
        ({"num_workers": 0}, "`num_workers` should be a positive integer"),
        ({"strategies": []}, r"`strategies` is \[\], expected a list"),
        ({"strategies": ["funlora", "nothing"]}, "`strategy` is 'nothing', expected one of"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        ComparisonArguments(**arguments)


def cost():
    seconds = {"training": 1, "total": 2, "training_per_task": [1]}
    return {"seconds": seconds, "training_images_per_task": [1]}


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that were to be run; none is."""
    asked = []

    def record(jobs, num_workers, **kwargs):
        asked.extend(jobs)
        return [Outcome(results={"folder": str(job.folder), **cost()}) for job in jobs]

    monkeypatch.setattr(bases, "run_jobs", record)
    return asked


def test_every_strategy_runs_with_every_seed_in_a_folder_of_its_own(jobs, tmp_path):
    comparison = ComparisonArguments(
        strategies=["joint", "magmax:compared=cumulative,base_train_steps=5"], seeds=[4, 2]
    )
    reference = short_run(output_dir=str(tmp_path / "out"))
    compared = run_comparison(comparison, reference)
    # joint trains no base, and the other one's is its own.
    trained, jobs = jobs[:2], jobs[2:]
    assert [job.folder.parent for job in trained] == [tmp_path / "out" / "bases"] * 2
    assert len({job.folder for job in jobs}) == 4
    assert [(job.arguments.training.strategy, job.arguments.training.seed) for job in jobs] == [
        ("joint", 4),
        ("magmax", 4),
        ("joint", 2),
        ("magmax", 2),
    ]
    for job in jobs:
        assert job.arguments.training.output_dir == str(job.folder)
        assert job.folder.parent == tmp_path / "out" / f"seed_{job.arguments.training.seed}"
        assert job.arguments.training.resume_from_checkpoint == "latest"
        assert asdict(job.arguments.data) == asdict(reference.data)
    assert jobs[1].arguments.training.strategy_options == {"compared": "cumulative"}
    assert jobs[1].arguments.training.base_train_steps == 5
    assert jobs[0].arguments.training.base_train_steps == reference.training.base_train_steps
    for one in compared:
        assert [outcome.results["folder"] for outcome in one.outcomes] == [str(folder) for folder in one.folders]
        assert [folder.parent.name for folder in one.folders] == ["seed_4", "seed_2"]


def test_every_seed_runs_with_the_chosen_rate(jobs, tmp_path, monkeypatch):
    asked = []

    def choose(candidates, rates, output_dir, num_workers):
        asked.extend(candidates)
        assert (rates, output_dir) == ([0.1, 0.2], tmp_path)
        return {candidate.key: 0.2 for candidate in candidates}

    monkeypatch.setattr(runner, "choose_learning_rates", choose)
    strategies = [
        "replay",
        "guide:guidance_scale=0.5",
        "ddgr",
        "magmax",
        "magmax:adapter_learning_rate=0.3",
        "finetune",
    ]
    comparison = ComparisonArguments(strategies=strategies, seeds=[3, 4], learning_rates=[0.1, 0.2])
    run_comparison(comparison, short_run(output_dir=str(tmp_path)))
    # guide's generator is replay's, ddgr's is its own; one names its rate.
    assert [candidate.key for candidate in asked] == ["replay", "ddgr", "magmax", "finetune"]
    assert {candidate.arguments.training.seed for candidate in asked} == {3}
    runs = [job for job in jobs if not job.label.startswith("base")]
    assert len(jobs) - len(runs) == 2
    for job in runs:
        training = job.arguments.training
        low_rank = training.strategy == "magmax"
        rate = training.adapter_learning_rate if low_rank else training.base_learning_rate
        given = job.folder.name.startswith("magmax_adapter_learning_rate-0.3")
        assert rate == (0.3 if given else 0.2)
        assert given or job.folder.name.endswith("_learning_rate_0.2")


def test_overwriting_starts_every_run_anew(jobs, tmp_path):
    reference = short_run(output_dir=str(tmp_path), overwrite_output_dir=True)
    run_comparison(ComparisonArguments(strategies=["joint"], seeds=[0]), reference)
    training = jobs[0].arguments.training
    assert (training.overwrite_output_dir, training.resume_from_checkpoint) == (True, None)


@pytest.mark.parametrize(
    ("reference", "strategy", "words"),
    [
        ({"push_to_hub": True}, "joint", "`push_to_hub` is set, but the runs of a comparison"),
        ({"update_class": 3}, "joint", "`update_class` is 3, expected None"),
        (
            {"strategy": "magmax", "strategy_options": {"scaling": 1.0}},
            "joint",
            "give them with the strategy, as in --strategies name:key=value",
        ),
        (
            {},
            "joint:adapter_learning_rate=fast",
            "'joint .adapter_learning_rate=fast.', whose run is not possible: .*expected a number",
        ),
        (
            {"class_order_seed": 1},
            "joint",
            r"`learning_rates` is \[0.1\], and `class_order` or `class_order_seed` is given",
        ),
        ({}, "joint:solver=eluer", "whose run is not possible: `solver` is 'eluer'"),
        ({"base_model": "somewhere"}, "joint", "cannot add classes to `base_model` 'somewhere'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(jobs, tmp_path, reference, strategy, words):
    with pytest.raises(ValueError, match=words):
        run_comparison(
            ComparisonArguments(strategies=["funlora", strategy], seeds=[0], learning_rates=[0.1]),
            short_run(output_dir=str(tmp_path), **reference),
        )
    assert not jobs
    assert not list(tmp_path.iterdir())


def test_a_second_comparison_in_one_folder_is_refused(jobs, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match="is in use by process"):
        run_comparison(ComparisonArguments(strategies=["funlora"], seeds=[0]), short_run(output_dir=str(tmp_path)))
    assert not jobs


def test_failures_are_named_with_their_seed(tmp_path):
    compared = made_up_comparison(tmp_path, failed=(("frozen", 1), ("joint", 0)))
    assert [(label, seed) for label, seed, _ in failures(compared)] == [("frozen", 1), ("joint", 0)]
    assert [len(one.finished) for one in compared] == [3, 2, 2]
