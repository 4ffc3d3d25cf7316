from __future__ import annotations

from contextlib import nullcontext

import pytest

from funlora_hf.continual.config import ContinualTrainingArguments, run_settings
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.utils.files import write_json


SETTINGS = {"Training": {"seed": 0, "output_dir": "x", "base_learning_rate": 0.1}}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open(SETTINGS, overwrite=False, resume=False)
    folder.base.mkdir()
    return folder


@pytest.mark.parametrize(
    ("changed", "finished", "text"),
    [
        (
            {},
            False,
            "this run, unfinished: 1 of 3 tasks are learned. Pass --resume_from_checkpoint latest to go on, --ov",
        ),
        (
            {},
            True,
            r"this run, which is finished \(see `funlora info .*\). Pass --overwrite_output_dir to delete it, or",
        ),
        (
            {"seed": 1},
            False,
            r"another run \(seed was 0 and is 1\)\. Pass its arguments \(--seed 0\) and --resume_from_checkpoint latest to go on with it, --ov",
        ),
        (
            {"seed": 1},
            True,
            r"another run, which is finished \(seed was 0 and is 1\)\. Pass --overwrite_output_dir to delete it, or",
        ),
        # Other tasks follow from them.
        (
            {"num_tasks": 2},
            False,
            r"another run \(num_tasks was None and is 2\)\. Pass its arguments \(no --num_tasks\) and",
        ),
        ({}, False, r"another run \(task 2 was \[2\] and is None\)\. Pass its images and --resume"),
    ],
)
def test_another_run_is_not_overwritten_unasked(changed, finished, text, tmp_path):
    folder, tasks = RunFolder(tmp_path), {"tasks": {f"task {number}": [number] for number in (1, 2, 3)}}
    folder.open({**SETTINGS, **tasks}, overwrite=False, resume=False)
    folder.base.mkdir()
    write_json(folder.checkpoints / "strategy" / "task_1.safetensors", {})
    if finished:
        write_json(folder.results, {})
    if "num_tasks" in changed or "task 2" in text:
        tasks = {"tasks": {"task 1": [1], "task 3": [3]}}
    with pytest.raises(FileExistsError, match=f"holds {text}"):
        folder.open({**tasks, "Training": {**SETTINGS["Training"], **changed}}, overwrite=False, resume=False)
    assert folder.base.is_dir()


def test_overwriting_deletes_the_run_and_nothing_else(run):
    mine = run.path / "notes.txt"
    mine.write_text("keep")
    run.open(SETTINGS, overwrite=True, resume=False)
    assert not run.base.exists()
    assert mine.read_text() == "keep"


def test_resuming_needs_the_same_settings(run):
    other = {"Training": {**SETTINGS["Training"], "base_learning_rate": 0.2}}
    with pytest.raises(ValueError, match=r"base_learning_rate was 0\.1 and is 0\.2"):
        run.open(other, overwrite=False, resume=True)
    run.open({"Training": {**SETTINGS["Training"], "output_dir": "moved"}}, overwrite=False, resume=True)


def test_resuming_in_an_empty_folder_starts_afresh_with_a_warning(tmp_path, caplog):
    RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=True)
    assert "No checkpoint to resume from" in caplog.text
    assert "holds no run" in caplog.text


def test_resuming_a_run_that_died_early_starts_afresh_with_a_warning(tmp_path, caplog):
    RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=False)
    RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=True)
    assert "holds a run without one" in caplog.text


def test_resuming_a_run_that_died_before_it_began_starts_afresh(tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=True)
    assert "No checkpoint to resume from" in caplog.text


def test_resuming_a_run_with_results_does_not_warn(run, caplog):
    run.open(SETTINGS, overwrite=False, resume=True)
    assert caplog.text == ""


def test_a_folder_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="so its settings are unknown"):
        RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=True)


def test_a_folder_that_is_lost_meanwhile_is_missed(run, tmp_path):
    run.check_there()
    run.check_there()
    run.path.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"was deleted or moved during the run"):
        run.check_there()
    (tmp_path / "moved").rename(run.path)
    run.check_there()


def test_a_folder_without_settings_has_none_to_lose(tmp_path):
    folder = RunFolder(tmp_path)
    folder.check_there()
    folder.check_there()


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": 5},
        {"classes": []},
        {"classes": {"class x": {"name": "a"}}},
        {"classes": {"class 1": {}}},
        {"classes": {"class 1": 2}},
    ],
)
def test_damaged_settings_are_named(change, run):
    write_json(run.checkpoints / "run.json", {**SETTINGS, **change})
    with pytest.raises(ValueError, match=r"run\.json is damaged: "):
        run.classes() if "classes" in change else run.unfinished()


def test_an_update_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="`update_class` has nothing to update"):
        RunFolder(tmp_path).check_update()


@pytest.mark.parametrize("place", ["base", "base/unet", "adapters", "results.json", "model/../base", "figures/images"])
def test_overwriting_never_deletes_what_the_run_reads(place, run):
    for folder in ("base/unet", "adapters", "model", "figures/images"):
        (run.path / folder).mkdir(parents=True, exist_ok=True)
    run.results.write_text("{}")
    before = sorted(path for path in run.path.rglob("*"))
    with pytest.raises(ValueError, match=r"`overwrite_output_dir` would delete .*`dataset_name`"):
        run.open(SETTINGS, overwrite=True, resume=False, needed={"dataset_name": str(run.path / place)})
    assert sorted(path for path in run.path.rglob("*")) == before


def test_overwriting_follows_no_link_to_what_the_run_reads(run, tmp_path):
    (tmp_path / "link").symlink_to(run.base)
    with pytest.raises(ValueError, match="`base_model`"):
        run.open(SETTINGS, overwrite=True, resume=False, needed={"base_model": str(tmp_path / "link")})
    run.open(SETTINGS, overwrite=True, resume=False, needed={"base_model": str(tmp_path)})
    assert not run.base.exists()


def test_overwriting_deletes_nothing_where_one_thing_is_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run.path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="model is a link"):
        run.open(SETTINGS, overwrite=True, resume=False)
    assert run.base.is_dir()


@pytest.mark.parametrize("name", ["base/unet", "model/mine.txt", "figures/mine.png", "logs/today", "checkpoints/best"])
def test_overwriting_deletes_nothing_where_no_run_was(name, tmp_path):
    """Other projects have folders of these names."""
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=rf"would delete {name.partition('/')[0]} in .*unknown whether a run has made"
    ):
        RunFolder(tmp_path).open(SETTINGS, overwrite=True, resume=False)
    assert (tmp_path / name).is_dir()
    with pytest.raises(FileExistsError, match=r"Pass another folder\.$"):
        RunFolder(tmp_path).open(SETTINGS, overwrite=False, resume=False)


def test_overwriting_deletes_no_adapters_that_the_run_has_not_learned(tmp_path):
    folder = RunFolder(tmp_path)
    classes = {"classes": {"class 4": {"name": "four"}}}
    folder.open({**SETTINGS, **classes}, overwrite=False, resume=False)
    for name in ("class_4", "class_8", "mine"):
        (folder.adapters / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"would delete class_8, mine in .*funlora delete"):
        folder.open(SETTINGS, overwrite=True, resume=False)
    for name in ("class_8", "mine"):
        (folder.adapters / name).rename(tmp_path / name)
    folder.open(SETTINGS, overwrite=True, resume=False)
    assert not folder.adapters.exists()


@pytest.mark.parametrize(
    "now", [{"class 0": "a"}, {"class 0": "a", "class 1": "c"}, {"class 0": "a", "class 1": "b", "class 2": "d"}]
)
def test_resuming_needs_the_same_classes(now, tmp_path):
    folder = RunFolder(tmp_path / "run")
    classes = {"class 0": "a", "class 1": "b"}
    folder.open({**SETTINGS, "classes": classes}, overwrite=False, resume=False)
    folder.base.mkdir()
    folder.open({**SETTINGS, "classes": classes}, overwrite=False, resume=True)
    with pytest.raises(ValueError, match=r"other settings: class [12] was .* and is "):
        folder.open({**SETTINGS, "classes": now}, overwrite=False, resume=True)


@pytest.mark.parametrize(("warmup", "differs"), [(True, False), (False, True)])
def test_a_setting_that_the_run_did_not_know_had_its_default(warmup, differs, tmp_path):
    folder = RunFolder(tmp_path / "run")
    settings = run_settings(ContinualTrainingArguments(base_ema_warmup=warmup))
    (name,) = settings
    of_an_earlier_version = {key: value for key, value in settings[name].items() if key != "base_ema_warmup"}
    folder.open({name: of_an_earlier_version}, overwrite=False, resume=False)
    folder.base.mkdir()
    with pytest.raises(ValueError, match="base_ema_warmup was True and is False") if differs else nullcontext():
        folder.open(settings, overwrite=False, resume=True)
