from __future__ import annotations

from dataclasses import replace

import pytest
from runs import digests, short_run

from comparison import bases, jobs
from comparison.bases import check_seeds, run_on_shared_bases
from comparison.jobs import Job, Outcome
from funlora_hf.run import run
from funlora_hf.utils.files import read_json


@pytest.fixture
def here(monkeypatch):
    """Runs jobs one after the other in this process; the folders of those that ran."""
    ran = []

    def run_here(asked, num_workers, **kwargs):
        ran.extend(job.folder for job in asked)
        return [jobs._run_job(job) for job in asked]

    monkeypatch.setattr(bases, "run_jobs", run_here)
    return ran


@pytest.fixture
def asked(monkeypatch):
    """The jobs that were to be run; none is, and those of `asked.failing` fail."""

    class Asked(list):
        failing = ()

    asked = Asked()

    def record(jobs, num_workers, **kwargs):
        asked.extend(jobs)
        failed = Outcome(error="ValueError: went wrong")
        return [failed if job.label in asked.failing else Outcome(results=results_of(job)) for job in jobs]

    monkeypatch.setattr(bases, "run_jobs", record)
    return asked


def results_of(job):
    # A base takes 5 of each, a run 1 for each task.
    per_task = [5] if job.label.startswith("base") else [0, 1, 1]
    seconds = {"training": sum(per_task), "total": sum(per_task) + 10, "training_per_task": list(per_task)}
    return {"seconds": seconds, "training_images_per_task": list(per_task)}


def job(name, folder, **overrides):
    path = folder / name
    return Job(short_run(output_dir=str(path), strategy=name.partition("_")[0], **overrides), path, name)


def share(*asked_jobs):
    folder = asked_jobs[0].folder.parent
    return run_on_shared_bases(asked_jobs, folder / "bases", 1, description="runs")


@pytest.mark.parametrize("strategy", ["funlora", pytest.param("replay", marks=pytest.mark.slow)])
def test_what_is_learned_on_a_shared_base_is_the_same_to_the_bit(here, tmp_path, strategy):
    short = {"num_tasks": 2, "image_quality": "none", "base_train_steps": 2, "adapter_train_steps": 2}
    if strategy == "replay":
        short["strategy_options"] = {"num_inference_steps": 2, "classifier_train_steps": 3}
    own = short_run(output_dir=str(tmp_path / "own"), strategy=strategy, **short)
    alone = run(own)
    (shared,) = share(job(strategy, tmp_path, **short))
    assert not (tmp_path / strategy / "base").exists()
    for key in ("LA", "accuracy_matrix", "held_out_loss", "own_classifier", "tasks", "class_order"):
        assert shared.results[key] == alone[key]
    assert shared.results["training_images_per_task"] == alone["training_images_per_task"]
    assert shared.results["seconds"]["training_per_task"][0] > 0
    assert (
        read_json(tmp_path / strategy / "results.json")["seconds"]["training_per_task"][0]
        < (shared.results["seconds"]["training_per_task"][0])
    )
    learned = "adapters" if strategy == "funlora" else "model"
    first, second = (digests(tmp_path / name / learned) for name in ("own", strategy))
    assert {name for name in first if name.endswith("safetensors")}
    assert {name: first[name] for name in first if name.endswith("safetensors")} == {
        name: second[name] for name in second if name.endswith("safetensors")
    }


@pytest.mark.parametrize("seeds", [[], [1, 1], (2, 0, 2)])
def test_seeds_of_several_runs_differ(seeds):
    check_seeds([3, 1, 2])
    with pytest.raises(ValueError, match=r"`seeds` is \[.*\], expected different numbers, at least one"):
        check_seeds(seeds)


def test_runs_of_one_base_share_it_and_count_its_cost(asked, tmp_path):
    first, second = share(job("funlora", tmp_path), job("magmax", tmp_path, adapter_learning_rate=0.5))
    assert [one.label for one in asked] == ["base, seed 0", "funlora", "magmax"]
    assert {one.arguments.model.base_model for one in asked[1:]} == {str(asked[0].folder / "base")}
    for outcome in (first, second):
        assert outcome.results["seconds"] == {"training": 7, "total": 17, "training_per_task": [5, 1, 1]}
        assert outcome.results["training_images_per_task"] == [5, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"base_learning_rate": 2e-3},
        {"max_train_steps": 5},
        {"validation_fraction": 0.2},
        {"timestep_density": "logit_normal"},
    ],
)
def test_what_shapes_a_base_makes_another_one(asked, tmp_path, change):
    share(job("funlora", tmp_path), job("magmax", tmp_path, **change))
    assert len({one.folder for one in asked if one.label.startswith("base")}) == 2


def test_what_comes_after_the_base_leaves_it(asked, tmp_path):
    plain = job("finetune", tmp_path)
    faster = replace(job("finetune_fast", tmp_path), after_base={"base_learning_rate": 0.5})
    share(plain, faster)
    base, first, second = asked
    assert base.arguments.training.base_learning_rate == plain.arguments.training.base_learning_rate
    assert [one.arguments.training.base_learning_rate for one in (first, second)] == [
        plain.arguments.training.base_learning_rate,
        0.5,
    ]


@pytest.mark.parametrize(
    "alone",
    [
        {"name": "joint"},
        {"name": "diffclass", "unet_config": None, "strategy_options": {"pretrained": "there"}},
        {"name": "funlora", "base_model": "somewhere"},
        {"name": "funlora", "class_order_seed": 3},
        {"name": "funlora", "class_order": [str(digit) for digit in range(10)]},
    ],
)
def test_runs_that_cannot_share_a_base_are_left_alone(asked, tmp_path, alone):
    given = job(folder=tmp_path, **alone)
    (outcome,) = share(given)
    assert [one.label for one in asked] == [given.label]
    assert asked[0].arguments.model.base_model == alone.get("base_model")
    assert outcome.results["seconds"]["training_per_task"] == [0, 1, 1]


def test_a_base_that_fails_takes_only_its_runs_along(asked, tmp_path):
    asked.failing = ("base, seed 0",)
    lost, joint, other = share(job("funlora", tmp_path), job("joint", tmp_path), job("magmax", tmp_path, seed=1))
    log = tmp_path / "bases" / asked[0].folder.name / "log.txt"
    assert lost.error == f"its base failed: ValueError: went wrong. See {log}."
    assert joint.results
    assert other.results
    assert "funlora" not in [one.label for one in asked]


def test_overwriting_trains_the_base_again_too(asked, tmp_path):
    share(job("funlora", tmp_path, overwrite_output_dir=True))
    for one in asked:
        training = one.arguments.training
        assert (training.overwrite_output_dir, training.resume_from_checkpoint) == (True, None)
