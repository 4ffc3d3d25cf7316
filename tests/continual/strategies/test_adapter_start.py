"""Classes of `funlora` that start at the mean of those of earlier tasks, against numpy; stops on the way; updates."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import learn, make_strategy, stop_at

from funlora_hf.continual.config import LATEST
from funlora_hf.data.tasks import Task
from funlora_hf.utils.files import file_sha256, read_json


# The base, two tasks whose classes start cold and at the mean of two, and one at the mean of three.
TASKS = (Task(0, (5, 1)), Task(1, (0, 7)), Task(2, (3,)))
WEIGHTS = "adapter_model.safetensors"


def strategy(folder, **training):
    return make_strategy("funlora", folder, tasks=TASKS, **{"adapter_start": "mean", **training})


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run with this start; not to be changed."""
    folder = tmp_path_factory.mktemp("mean") / "run"
    learn(strategy(folder))
    return folder


@pytest.fixture
def copy(learned, tmp_path):
    shutil.copytree(learned, tmp_path / "run")
    return tmp_path / "run"


def file(folder, class_id):
    return folder / "adapters" / f"class_{class_id}" / WEIGHTS


def started_from(folder, class_id):
    return read_json(file(folder, class_id).parent / "adapter_config.json")["started_from"]


def adapters(folder):
    """What is the same wherever a run is."""
    return {class_id: (file_sha256(file(folder, class_id)), started_from(folder, class_id)) for class_id in (0, 7, 3)}


def values(trainable, adapter="live"):
    """The numbers of an adapter that is built, by the keys of its file."""
    ending = f".{adapter}"
    return {k.removesuffix(ending): p.detach().numpy() for k, p in trainable.parameters.items() if k.endswith(ending)}


def mean(folder, *class_ids):
    files = [load_file(file(folder, class_id)) for class_id in class_ids]
    return {key: np.mean([one[key].astype(np.float64) for one in files], 0).astype(np.float32) for key in files[0]}


def test_a_class_starts_at_the_mean_of_earlier_tasks_and_the_first_ones_cold(learned, tmp_path):
    built = strategy(learned)
    (phase,) = built.phases(TASKS[2])
    np.testing.assert_equal(values(built.build(phase)), mean(learned, 0, 7))
    assert started_from(learned, 3) == {f"class_{c}": file_sha256(file(learned, c)) for c in (0, 7)}
    learn(strategy(tmp_path / "cold", adapter_start="cold"))
    for class_id in (0, 7):  # not of its own task
        assert started_from(learned, class_id) is None
        assert file_sha256(file(learned, class_id)) == file_sha256(file(tmp_path / "cold", class_id))
    assert file_sha256(file(learned, 3)) != file_sha256(file(tmp_path / "cold", 3))


@pytest.mark.parametrize(("phase", "step"), [("class_7", 2), ("class_3", 1), ("class_3", 3)])
def test_a_stopped_run_goes_on_to_the_same_bytes(phase, step, learned, tmp_path):
    stopped = strategy(tmp_path / "run", checkpointing_steps=1)
    stop_at(stopped, phase, step)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped)
    assert not (tmp_path / "run" / "adapters" / phase).exists()
    learn(strategy(tmp_path / "run", checkpointing_steps=1, resume_from_checkpoint=LATEST))
    assert adapters(tmp_path / "run") == adapters(learned)


def test_steps_from_adapters_that_have_changed_are_dropped(learned, tmp_path, caplog):
    """What is learned and what the config says then come from those there are."""
    stopped = strategy(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=1)
    stop_at(stopped, "class_3", 4)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped)
    shutil.copy(file(learned, 3), file(tmp_path / "run", 0))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "class_3")
    again = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "resume_from_checkpoint": LATEST}
    stopped = strategy(tmp_path / "run", **again)
    stop_at(stopped, "class_3", 2)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped)
    assert "class_3/step_3: its steps are dropped, since adapters" in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "class_3").iterdir()] == ["step_1"]
    for place in ("run", "other"):
        learn(strategy(tmp_path / place, **again))
    assert adapters(tmp_path / "run") == adapters(tmp_path / "other")
    assert started_from(tmp_path / "run", 3)["class_0"] == file_sha256(file(learned, 3))


def test_classes_that_train_together_start_alike(tmp_path):
    tasks = (TASKS[0], Task(1, (0,)), Task(2, (7, 3)))
    learn(make_strategy("funlora", tmp_path, tasks=tasks, adapter_start="mean", class_batches="mixed"))
    built = make_strategy("funlora", tmp_path, tasks=tasks, adapter_start="mean", class_batches="mixed")
    (phase,) = built.phases(tasks[2])
    trainable = built.build(phase)
    for class_id in phase.class_ids:
        np.testing.assert_equal(values(trainable, f"class_{class_id}"), load_file(file(tmp_path, 0)))
        assert (
            started_from(tmp_path, class_id) == trainable.started_from == {"class_0": file_sha256(file(tmp_path, 0))}
        )


def test_frozen_starts_its_vector_at_the_mean(tmp_path):
    built = learn(make_strategy("frozen", tmp_path, tasks=TASKS, adapter_start="mean"))
    (phase,) = built.phases(TASKS[2])
    found = values(built.build(phase))
    assert len(found) == 1
    np.testing.assert_equal(found, mean(tmp_path, 0, 7))


def test_adapters_of_another_configuration_are_left_out(copy, caplog):
    caplog.set_level("INFO")
    built = strategy(copy)
    power = replace(built.setting, model=replace(built.setting.model, function="power"))
    (phase,) = built.phases(TASKS[2])
    trainable = type(built)(power).build(phase)
    assert trainable.started_from == {}
    assert "phase class_3: starts at the base, since no earlier task has adapters like it" in caplog.text


def test_an_update_starts_where_it_is_told(copy):
    def update(mode):
        return strategy(copy, adapter_start="cold", update_class=3, update_mode=mode).build_update(3)

    np.testing.assert_equal(values(update("continue")), load_file(file(copy, 3)))
    retrained = update("retrain")
    np.testing.assert_equal(values(retrained), mean(copy, 0, 7))
    assert retrained.started_from == retrained.module.peft_config["live"].started_from == started_from(copy, 3)
    cold = update("cold")
    assert cold.module.peft_config["live"].started_from is None
    assert all((value == 1).all() for key, value in values(cold).items() if key.endswith("funlora_A"))


@pytest.mark.parametrize("change", ["deleted", "trained again"])
def test_a_start_that_is_gone_is_named(change, copy):
    if change == "deleted":
        shutil.rmtree(file(copy, 7).parent)
    else:
        shutil.copy(file(copy, 0), file(copy, 7))
    with pytest.raises(ValueError, match=r"class 3 started from class_7, which are gone .* pass --update_mode cold"):
        strategy(copy, update_class=3, update_mode="retrain").build_update(3)
    strategy(copy, update_class=3, update_mode="cold").build_update(3)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("funlora", {"peft_method": "lora_conv_v1"}, "`peft_method` 'lora_conv_v1' has no mean: take 'cold'"),
        ("naive_lora", {}, "`adapter_start` is 'mean', which `strategy` 'naive_lora' does not use"),
        ("joint", {}, "`adapter_start` is 'mean', which `strategy` 'joint' does not use"),
    ],
)
def test_what_has_no_mean_is_refused(name, model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, tmp_path, adapter_start="mean", model=model)
